// The line scan on the GPU, plainly: a block scans one direction of one image for a slice of
// channels, with the state of the previous line in shared memory, and all blocks of all directions
// run in one launch.
//
// The backward pass is three kernels: the scan of the adjoint, in the opposite order; then, pixel
// by pixel, the gradients of the coefficients; and those of λ and x. Every sum has one order, so
// results repeat bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "line_scan_kernels.h"

namespace cgspn_seg {
namespace {

// A line step costs a barrier, so a block is as wide as its line allows; 32 channels fill a 64-byte
// row of bfloat16.
constexpr int kMaxThreads = 512;
constexpr int64_t kMaxSliceChannels = 32;
constexpr int64_t kPointwiseThreads = 256;

// exp(-logit) of a pixel's three logits.
template <typename A, typename T>
__device__ Taps<A> load_exponentials(const T* logits, int64_t tap_stride) {
  const auto exponential = [](T logit) { return exp(exponent(static_cast<A>(logit))); };
  return {exponential(logits[0]), exponential(logits[tap_stride]),
          exponential(logits[2 * tap_stride])};
}

template <typename A, typename T>
__device__ Taps<A> load_coefficients(const T* logits, int64_t tap_stride, bool has_prev,
                                     bool has_next) {
  return normalize(load_exponentials<A>(logits, tap_stride), A(has_prev), A(has_next)).w;
}

// The scan that a block does: image, direction and channels.
struct BlockScan {
  int64_t b, d, first_channel, num_channels;

  __device__ BlockScan(const Problem& p, int64_t slice_channels)
      : b(blockIdx.x / p.num_directions),
        d(blockIdx.x % p.num_directions),
        first_channel(blockIdx.y * slice_channels),
        num_channels(min(slice_channels, p.channels - first_channel)) {}
};

template <typename A>
__device__ A* shared_lines() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<A*>(memory);
}

// A line in shared memory has an empty pixel on either side: (positions + 2) x channels.
__host__ __device__ int64_t line_size(int64_t num_positions, int64_t channels) {
  return (num_positions + 2) * channels;
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    scan_forward(Problem p, ForwardTensors<T> t, int64_t slice_channels) {
  using A = Accumulator<T>;
  const BlockScan s(p, slice_channels);
  const Walk walk(p, s.d);
  const int64_t size = line_size(walk.num_positions, s.num_channels);
  A* previous = shared_lines<A>();
  A* state = previous + size;
  for (int64_t i = threadIdx.x; i < 2 * size; i += blockDim.x) previous[i] = A(0);
  __syncthreads();
  for (int64_t line = 0; line < walk.num_lines; ++line) {
    const bool starts = walk.starts_segment(line);
    for (int64_t i = threadIdx.x; i < walk.num_positions * s.num_channels; i += blockDim.x) {
      const int64_t j = i / s.num_channels, channel = s.first_channel + i % s.num_channels;
      const int64_t row = walk.row(line, j), col = walk.col(line, j);
      A h = static_cast<A>(t.gate.at(s.b, row, col, s.d)[channel]) *
            static_cast<A>(t.x.at(s.b, row, col)[channel]);
      if (!starts) {
        const T* logits = t.weight.at(s.b, row, col, s.d) + channel / p.group_size();
        const Taps<A> w =
            load_coefficients<A>(logits, t.weight.tap_stride, j > 0, j + 1 < walk.num_positions);
        h += w.prev * previous[i] + w.mid * previous[i + s.num_channels] +
             w.next * previous[i + 2 * s.num_channels];
      }
      state[i + s.num_channels] = h;
      t.h.at(s.b, row, col, s.d)[channel] = static_cast<T>(h);
    }
    __syncthreads();
    A* const swap = previous;
    previous = state;
    state = swap;
  }
}

// The share of a pixel's adjoint that goes to its neighbour at -1, 0, +1 is written to one of three
// lines, so that the line before adds three numbers in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    scan_adjoint(Problem p, BackwardTensors<T> t, int64_t slice_channels) {
  using A = Accumulator<T>;
  const BlockScan s(p, slice_channels);
  const Walk walk(p, s.d);
  const int64_t size = line_size(walk.num_positions, s.num_channels);
  A* later = shared_lines<A>();
  A* shares = later + 3 * size;
  for (int64_t i = threadIdx.x; i < 6 * size; i += blockDim.x) later[i] = A(0);
  __syncthreads();
  for (int64_t line = walk.num_lines - 1; line >= 0; --line) {
    const bool starts = walk.starts_segment(line);
    for (int64_t i = threadIdx.x; i < walk.num_positions * s.num_channels; i += blockDim.x) {
      const int64_t j = i / s.num_channels, channel = s.first_channel + i % s.num_channels;
      const int64_t row = walk.row(line, j), col = walk.col(line, j);
      A adjoint = static_cast<A>(t.grad_h.at(s.b, row, col, s.d)[channel]);
      for (int tap = 0; tap < 3; ++tap) adjoint += later[tap * size + i + s.num_channels];
      t.adjoint.at(s.b, row, col, s.d)[channel] = adjoint;
      Taps<A> w{};
      if (!starts) {
        const T* logits = t.weight.at(s.b, row, col, s.d) + channel / p.group_size();
        w = load_coefficients<A>(logits, t.weight.tap_stride, j > 0, j + 1 < walk.num_positions);
      }
      shares[i] = w.prev * adjoint;
      shares[size + i + s.num_channels] = w.mid * adjoint;
      shares[2 * size + i + 2 * s.num_channels] = w.next * adjoint;
    }
    __syncthreads();
    A* const swap = later;
    later = shares;
    shares = swap;
  }
}

// One thread per pixel, direction and channel group.
template <typename T>
__global__ void __launch_bounds__(kPointwiseThreads)
    coefficient_gradients(Problem p, BackwardTensors<T> t, int64_t count) {
  using A = Accumulator<T>;
  const int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (index >= count) return;
  const int64_t group = index % p.groups, d = index / p.groups % p.num_directions;
  const int64_t pixel = index / (p.groups * p.num_directions);
  const int64_t col = pixel % p.width, row = pixel / p.width % p.height,
                b = pixel / (p.width * p.height);
  const Walk walk(p, d);
  const int64_t line = walk.line(row, col), j = walk.position(row, col);
  T* const d_logits = t.grad_weight.at(b, row, col, d) + group;
  if (walk.starts_segment(line)) {
    for (int tap = 0; tap < 3; ++tap)
      d_logits[tap * t.grad_weight.tap_stride] = static_cast<T>(A(0));
    return;
  }
  const bool has_prev = j > 0, has_next = j + 1 < walk.num_positions;
  const int64_t first = group * p.group_size();
  const A* const adjoint = t.adjoint.at(b, row, col, d) + first;
  const auto gradient = [&](int64_t position) {
    const T* const h =
        t.h.at(b, walk.row(line - 1, position), walk.col(line - 1, position), d) + first;
    A sum = 0;
    for (int64_t c = 0; c < p.group_size(); ++c) sum += adjoint[c] * static_cast<A>(h[c]);
    return sum;
  };
  const Taps<A> d_w{has_prev ? gradient(j - 1) : A(0), gradient(j),
                    has_next ? gradient(j + 1) : A(0)};
  const Taps<A> e = load_exponentials<A>(t.weight.at(b, row, col, d) + group, t.weight.tap_stride);
  const Coefficients<A> c = normalize(e, A(has_prev), A(has_next));
  const Taps<A> result = normalize_backward(d_w, c, complements(e));
  d_logits[0] = static_cast<T>(result.prev);
  d_logits[t.grad_weight.tap_stride] = static_cast<T>(result.mid);
  d_logits[2 * t.grad_weight.tap_stride] = static_cast<T>(result.next);
}

// One thread per pixel and channel: both factors of λ ⊙ x from the adjoints.
template <typename T>
__global__ void __launch_bounds__(kPointwiseThreads)
    input_gradients(Problem p, BackwardTensors<T> t, int64_t count) {
  using A = Accumulator<T>;
  const int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (index >= count) return;
  const int64_t channel = index % p.channels, pixel = index / p.channels;
  const int64_t col = pixel % p.width, row = pixel / p.width % p.height,
                b = pixel / (p.width * p.height);
  const A x = static_cast<A>(t.x.at(b, row, col)[channel]);
  A sum = 0;
  for (int64_t d = 0; d < p.num_directions; ++d) {
    const A adjoint = t.adjoint.at(b, row, col, d)[channel];
    sum += static_cast<A>(t.gate.at(b, row, col, d)[channel]) * adjoint;
    t.grad_gate.at(b, row, col, d)[channel] = static_cast<T>(x * adjoint);
  }
  t.grad_x.at(b, row, col)[channel] = static_cast<T>(sum);
}

// Launches a scan kernel that keeps `lines` lines in shared memory, with the widest slice of
// channels that fits.
template <typename A, typename Kernel, typename Tensors>
cudaError_t launch_scan(Kernel kernel, const Problem& p, const Tensors& tensors, int64_t lines,
                        cudaStream_t stream) {
  int device = 0, limit = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
    return error;
  }
  const int64_t longest = std::max(p.height, p.width);
  const auto bytes = [&](int64_t channels) {
    return lines * line_size(longest, channels) * static_cast<int64_t>(sizeof(A));
  };
  int64_t slice = std::min(p.channels, kMaxSliceChannels);
  while (slice > 1 && bytes(slice) > limit / 2) slice = (slice + 1) / 2;
  if (bytes(slice) > limit) return cudaErrorInvalidConfiguration;
  const int shared = static_cast<int>(bytes(slice));
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) {
    return error;
  }
  const int64_t work = (longest * slice + 31) / 32 * 32;
  const dim3 grid(static_cast<unsigned>(p.batch * p.num_directions),
                  static_cast<unsigned>((p.channels + slice - 1) / slice));
  kernel<<<grid, static_cast<unsigned>(std::min<int64_t>(work, kMaxThreads)), shared, stream>>>(
      p, tensors, slice);
  return cudaGetLastError();
}

template <typename Kernel, typename Tensors>
cudaError_t launch_pointwise(Kernel kernel, const Problem& p, const Tensors& tensors, int64_t count,
                             cudaStream_t stream) {
  const int64_t blocks = (count + kPointwiseThreads - 1) / kPointwiseThreads;
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(kPointwiseThreads), 0, stream>>>(
      p, tensors, count);
  return cudaGetLastError();
}

}  // namespace

template <typename T>
cudaError_t launch_forward(const Problem& p, const ForwardTensors<T>& tensors,
                           cudaStream_t stream) {
  return launch_scan<Accumulator<T>>(scan_forward<T>, p, tensors, 2, stream);
}

template <typename T>
cudaError_t launch_backward(const Problem& p, const BackwardTensors<T>& tensors,
                            cudaStream_t stream) {
  if (const cudaError_t error = launch_scan<Accumulator<T>>(scan_adjoint<T>, p, tensors, 6, stream))
    return error;
  const int64_t pixels = p.batch * p.height * p.width;
  if (const cudaError_t error = launch_pointwise(coefficient_gradients<T>, p, tensors,
                                                 pixels * p.num_directions * p.groups, stream)) {
    return error;
  }
  return launch_pointwise(input_gradients<T>, p, tensors, pixels * p.channels, stream);
}

#define CGSPN_INSTANTIATE(T)                                                                      \
  template cudaError_t launch_forward<T>(const Problem&, const ForwardTensors<T>&, cudaStream_t); \
  template cudaError_t launch_backward<T>(const Problem&, const BackwardTensors<T>&, cudaStream_t);
CGSPN_INSTANTIATE(float)
CGSPN_INSTANTIATE(double)
CGSPN_INSTANTIATE(__half)
CGSPN_INSTANTIATE(__nv_bfloat16)
#undef CGSPN_INSTANTIATE

}  // namespace cgspn_seg
