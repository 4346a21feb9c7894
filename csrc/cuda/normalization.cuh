// The normalization of line_scan.h on a thread's channels, from stored logits.
#pragma once

#include "memory.cuh"

namespace cgspn_seg {

// exp(-logit), of clamped logits.
__device__ inline float exponential(float logit) {
  constexpr float kLog2e = 1.442695041f;
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(logit * -kLog2e));
  return result;
}
__device__ inline double exponential(double logit) { return exp(-logit); }

template <typename T, int V>
__device__ Channels<Accumulator<T>, V> exponentials(Stored<T, V> logits) {
  using A = Accumulator<T>;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // two at a time; the bound is exact
    constexpr float kBound = kMaxLogit<float>;
    for (unsigned& word : logits.words) {
      const __nv_bfloat162 bound = __float2bfloat162_rn(-kBound);
      auto& pair = reinterpret_cast<__nv_bfloat162&>(word);
      pair = __hmax2_nan(pair, bound);
    }
  }
  auto channels = widen<T, V>(logits);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const A logit = std::is_same_v<T, __nv_bfloat16> ? channels[v] : clamp_logit(channels[v]);
    channels[v] = exponential(logit);
  }
  return channels;
}

}  // namespace cgspn_seg
