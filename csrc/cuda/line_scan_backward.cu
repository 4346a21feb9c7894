#include <algorithm>

#include "launch.cuh"
#include "scan_backward.cuh"

namespace cgspn_seg {
namespace {

constexpr int kPointwiseThreads = 256;

// grad_x: the sum over the directions of λ ⊙ dL/dh. A row of threads per pixel, V channels each;
// both tensors are contiguous. The last pixels come first: their shares may still be in the cache.
template <typename T, int V>
__global__ void __launch_bounds__(kPointwiseThreads)
    sum_over_directions(const T* shares, T* grad_x, int64_t pixels, int channels, int directions) {
  const int64_t pixel = pixels - 1 - (blockIdx.x * int64_t{blockDim.y} + threadIdx.y);
  if (pixel < 0) return;
  for (int channel = threadIdx.x * V; channel < channels; channel += blockDim.x * V) {
    const T* const first = shares + pixel * directions * channels + channel;
    Channels<Accumulator<T>, V> of[kMaxDirections] = {};
#pragma unroll
    for (int d = 0; d < kMaxDirections; ++d)
      if (d < directions) of[d] = load<T, V>(first + d * channels);
#pragma unroll
    for (int d = 1; d < kMaxDirections; ++d)
#pragma unroll
      for (int v = 0; v < V; ++v) of[0][v] += of[d][v];
    store<T, V>(grad_x + pixel * channels + channel, of[0]);
  }
}

// Gradients of shared logits from partial sums: a thread per pixel, direction and group.
template <typename T>
__global__ void __launch_bounds__(kPointwiseThreads)
    finish_coefficient_gradients(const __grid_constant__ Problem p,
                                 const __grid_constant__ BackwardTensors<T> t, int64_t count,
                                 int64_t parts) {
  using A = Accumulator<T>;
  const int64_t index = blockIdx.x * int64_t{kPointwiseThreads} + threadIdx.x;
  if (index >= count) return;
  const int64_t group = index % p.groups, d = index / p.groups % p.num_directions;
  const int64_t pixel = index / (p.groups * p.num_directions);
  const int64_t col = pixel % p.width, row = pixel / p.width % p.height;
  const int64_t b = pixel / (p.width * p.height);
  const Walk walk(p, d);
  const A* const sums = t.partial_sums.at(b, row, col, d) + group * parts;
  const T* const logits = t.weight.at(b, row, col, d) + group;
  T* const grad = t.grad_weight.at(b, row, col, d) + group;
  A d_w[3], e[3];
#pragma unroll
  for (int tap = 0; tap < 3; ++tap) {
    d_w[tap] = 0;
    for (int64_t i = 0; i < parts; ++i) d_w[tap] += sums[tap * t.partial_sums.tap_stride + i];
    e[tap] = exponential(clamp_logit(static_cast<A>(logits[tap * t.weight.tap_stride])));
  }
  const int64_t position = walk.position(row, col);
  const Coefficients<A> c =
      normalize(Taps<A>{e[0], e[1], e[2]}, A(position > 0), A(position + 1 < walk.num_positions));
  const Taps<A> result = normalize_backward(Taps<A>{d_w[0], d_w[1], d_w[2]}, c,
                                            complements(Taps<A>{e[0], e[1], e[2]}));
  const bool starts = walk.starts_segment(walk.line(row, col));
  grad[0] = static_cast<T>(starts ? A(0) : result.prev);
  grad[t.grad_weight.tap_stride] = static_cast<T>(starts ? A(0) : result.mid);
  grad[2 * t.grad_weight.tap_stride] = static_cast<T>(starts ? A(0) : result.next);
}

unsigned pointwise_blocks(int64_t count) {
  return static_cast<unsigned>((count + kPointwiseThreads - 1) / kPointwiseThreads);
}

}  // namespace

template <typename T>
cudaError_t launch_backward(const Problem& p, const BackwardTensors<T>& tensors, const Plan& plan,
                            cudaStream_t stream) {
  const cudaError_t error = dispatch_plan<T>(plan, [&](auto channels, auto items) {
    const auto kernel = p.group_size() > 1 ? scan_backward<T, channels(), true, items()>
                                           : scan_backward<T, channels(), false, items()>;
    return launch_plan(kernel, plan, stream, p, tensors);
  });
  if (error) return error;
  const int64_t pixels = p.batch * p.height * p.width;
  if (tensors.partial_sums.data != nullptr) {
    const int64_t count = pixels * p.num_directions * p.groups;
    const int64_t parts = p.group_size() / plan.reduced_channels;
    finish_coefficient_gradients<T>
        <<<pointwise_blocks(count), kPointwiseThreads, 0, stream>>>(p, tensors, count, parts);
    if (const cudaError_t status = cudaGetLastError()) return status;
  }
  if (p.num_directions > 1) {
    constexpr int kWidest = 16 / sizeof(T);
    const bool wide = p.channels % kWidest == 0;
    const auto kernel = wide ? sum_over_directions<T, kWidest> : sum_over_directions<T, 1>;
    const unsigned row = static_cast<unsigned>(
        std::min<int64_t>(p.channels / (wide ? kWidest : 1), kPointwiseThreads));
    const dim3 block(row, kPointwiseThreads / row);
    const int64_t blocks = (pixels + block.y - 1) / block.y;
    kernel<<<static_cast<unsigned>(blocks), block, 0, stream>>>(
        tensors.grad_input.data, tensors.grad_x.data, pixels, static_cast<int>(p.channels),
        static_cast<int>(p.num_directions));
  }
  return cudaGetLastError();
}

#define CGSPN_INSTANTIATE(T)                                                                      \
  template cudaError_t launch_backward<T>(const Problem&, const BackwardTensors<T>&, const Plan&, \
                                          cudaStream_t);
CGSPN_FOR_EACH_TYPE(CGSPN_INSTANTIATE)
#undef CGSPN_INSTANTIATE

}  // namespace cgspn_seg
