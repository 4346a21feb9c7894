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

// Channels that can be accessed at once in every tensor: their addresses, with all strides, are
// multiples of so many elements. At most 16 bytes.
int aligned_channels(std::initializer_list<at::Tensor> tensors) {
  const auto element = static_cast<int64_t>(tensors.begin()->element_size());
  int64_t bytes = 16;
  for (const at::Tensor& tensor : tensors) {
    const auto divide = [&](int64_t value) {
      while (value % bytes != 0) bytes /= 2;
    };
    divide(static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.data_ptr())));
    for (int64_t axis = 0; axis + 1 < tensor.dim(); ++axis)
      if (tensor.size(axis) > 1) divide(tensor.stride(axis) * element);
  }
  return static_cast<int>(std::max<int64_t>(bytes / element, 1));
}

// `tensors`: those that have the channels of x, which is the first.
Plan plan_for(Pass pass, const Problem& p, std::initializer_list<at::Tensor> tensors,
              const at::Tensor& weight) {
  const at::Tensor& x = *tensors.begin();
  for (const int64_t extent : {p.height, p.width, p.channels}) {
    TORCH_CHECK_VALUE(extent <= kMaxExtent, "line_scan: x has shape ", x.sizes(),
                      ", an axis of which is longer than the CUDA kernels can count, ", kMaxExtent);
  }
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, x.get_device()));
    return value;
  };
  Device device{attribute(cudaDevAttrMultiProcessorCount),
                attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), false};
  C10_CUDA_CHECK(kernels_have_clusters(&device.has_clusters));
  // Logits that several channels share are read one by one.
  const int aligned = p.group_size() > 1
                          ? aligned_channels(tensors)
                          : std::min(aligned_channels(tensors), aligned_channels({weight}));
  const Layout layout{static_cast<int>(x.element_size()), x.scalar_type() == at::kDouble ? 8 : 4,
                      aligned};
  const std::optional<Plan> plan = make_plan(pass, p, layout, device);
  int64_t longest = 0;
  for (int64_t d = 0; d < p.num_directions; ++d)
    longest = std::max(longest, Walk(p, d).num_positions);
  TORCH_CHECK_VALUE(plan.has_value(), "line_scan: x has shape ", x.sizes(), " and lines of ",
                    longest,
                    " pixels, more than the shared memory of this GPU holds (or more images than a "
                    "launch has blocks); use a coarser grid, or the CPU");
  return *plan;
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
  const Plan plan = plan_for(Pass::kForward, p, {dense_x, dense_gate}, dense_weight);
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const ForwardTensors<T> tensors{pixels<const T>(dense_x), pixels<const T>(dense_weight),
                                    pixels<const T>(dense_gate), pixels<T>(h)};
    C10_CUDA_CHECK(launch_forward<T>(p, tensors, plan, c10::cuda::getCurrentCUDAStream()));
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
  const Plan plan =
      plan_for(Pass::kBackward, p, {dense_x, dense_gate, dense_grad_h, dense_h}, dense_weight);
  const at::Tensor grad_input =
      p.num_directions > 1 ? at::empty(grad_gate.sizes(), x.options()) : grad_x;
  const bool whole_groups = plan.reduced_channels == p.group_size();
  const int64_t parts = whole_groups ? 0 : p.channels / plan.reduced_channels;
  const at::Tensor partial_sums =
      at::empty({p.batch, p.height, p.width, p.num_directions, 3, parts},
                x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const BackwardTensors<T> tensors{pixels<const T>(dense_x),    pixels<const T>(dense_weight),
                                     pixels<const T>(dense_gate), pixels<const T>(dense_grad_h),
                                     pixels<const T>(dense_h),    pixels<T>(grad_x),
                                     pixels<T>(grad_weight),      pixels<T>(grad_gate),
                                     pixels<T>(grad_input),       pixels<A>(partial_sums)};
    C10_CUDA_CHECK(launch_backward<T>(p, tensors, plan, c10::cuda::getCurrentCUDAStream()));
  });
  return {grad_x, grad_weight, grad_gate};
}

TORCH_LIBRARY_IMPL(cgspn_seg, CUDA, m) {
  m.impl("line_scan", &line_scan_cuda);
  m.impl("line_scan_backward", &line_scan_backward_cuda);
}

}  // namespace
}  // namespace cgspn_seg
