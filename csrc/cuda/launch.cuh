// From a plan to the kernel that follows it.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <type_traits>

#include "plan.h"

namespace cgspn_seg {

// Calls `body` with the plan's compile-time constants: channels a thread, items a thread.
template <typename T, typename Body>
cudaError_t dispatch_plan(const Plan& plan, const Body& body) {
  constexpr int kWide = 16 / sizeof(T), kNarrow = 8 / sizeof(T);
  const std::integral_constant<int, 1> one;
  if (plan.items_per_thread > 1) return body(one, std::integral_constant<int, kManyItems>{});
  if (plan.channels_per_thread == kWide) return body(std::integral_constant<int, kWide>{}, one);
  if (plan.channels_per_thread == kNarrow) return body(std::integral_constant<int, kNarrow>{}, one);
  return body(one, one);
}

template <typename Kernel, typename... Arguments>
cudaError_t launch_plan(Kernel kernel, const Plan& plan, cudaStream_t stream,
                        const Arguments&... arguments) {
  const int shared = static_cast<int>(plan.shared_bytes);
  // The limit belongs to the kernel, which another thread may launch for another shape.
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) {
    return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(plan.threads * plan.teams);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.strips), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = plan.strips > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments..., plan);
}

}  // namespace cgspn_seg
