// The line scan on the GPU: from PyTorch tensors to the kernels.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>

#include "../line_scan_op.h"
#include "line_scan_kernels.h"

namespace cgspn_seg {
namespace {

// Calls `body` with a value of the CUDA type that stores `dtype`.
template <typename Body>
void dispatch(at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case at::kFloat:
      return body(float{});
    case at::kDouble:
      return body(double{});
    case at::kHalf:
      return body(__half{});
    default:  // the argument checks let nothing else pass
      return body(__nv_bfloat16{});
  }
}

void check_launch(cudaError_t error, const Problem& p) {
  TORCH_CHECK_VALUE(
      error != cudaErrorInvalidConfiguration, "line_scan: x has lines of ",
      std::max(p.height, p.width),
      " pixels, more than the CUDA kernel holds in shared memory; use the CPU, or a coarser grid");
  C10_CUDA_CHECK(error);
}

at::Tensor line_scan_cuda(const at::Tensor& x, const at::Tensor& weight,
                          const at::Tensor& input_gate, at::IntArrayRef directions,
                          std::optional<int64_t> segment_length) {
  const Problem p = check_arguments(x, weight, input_gate, directions, segment_length);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor h = at::empty(input_gate.sizes(), x.options());
  if (h.numel() == 0) return h;
  const at::Tensor dense_x = with_dense_channels(x), dense_weight = with_dense_channels(weight),
                   dense_gate = with_dense_channels(input_gate);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const ForwardTensors<T> tensors{pixels<const T>(dense_x), pixels<const T>(dense_weight),
                                    pixels<const T>(dense_gate), pixels<T>(h)};
    check_launch(launch_forward<T>(p, tensors, c10::cuda::getCurrentCUDAStream()), p);
  });
  return h;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> line_scan_backward_cuda(
    const at::Tensor& grad_h, const at::Tensor& x, const at::Tensor& weight,
    const at::Tensor& input_gate, const at::Tensor& h, at::IntArrayRef directions,
    std::optional<int64_t> segment_length) {
  const Problem p =
      check_backward_arguments(grad_h, x, weight, input_gate, h, directions, segment_length);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor grad_x = at::empty(x.sizes(), x.options());
  const at::Tensor grad_weight = at::empty(weight.sizes(), x.options());
  const at::Tensor grad_gate = at::empty(input_gate.sizes(), x.options());
  if (grad_gate.numel() == 0) return {grad_x.zero_(), grad_weight.zero_(), grad_gate};
  const at::Tensor dense_x = with_dense_channels(x), dense_weight = with_dense_channels(weight),
                   dense_gate = with_dense_channels(input_gate),
                   dense_grad_h = with_dense_channels(grad_h), dense_h = with_dense_channels(h);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const at::Tensor adjoint = at::empty(
        grad_gate.sizes(), x.options().dtype(std::is_same_v<A, double> ? at::kDouble : at::kFloat));
    const BackwardTensors<T> tensors{
        pixels<const T>(dense_x),      pixels<const T>(dense_weight), pixels<const T>(dense_gate),
        pixels<const T>(dense_grad_h), pixels<const T>(dense_h),      pixels<T>(grad_x),
        pixels<T>(grad_weight),        pixels<T>(grad_gate),          pixels<A>(adjoint)};
    check_launch(launch_backward<T>(p, tensors, c10::cuda::getCurrentCUDAStream()), p);
  });
  return {grad_x, grad_weight, grad_gate};
}

TORCH_LIBRARY_IMPL(cgspn_seg, CUDA, m) {
  m.impl("line_scan", &line_scan_cuda);
  m.impl("line_scan_backward", &line_scan_backward_cuda);
}

}  // namespace
}  // namespace cgspn_seg
