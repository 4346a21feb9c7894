// The operator's schema, its argument checks (once, for every device), and the module that loads
// it.
#include <Python.h>
#include <torch/library.h>

#include <algorithm>

#include "line_scan_op.h"

namespace cgspn_seg {
namespace {

constexpr const char* kDirectionNames[] = {"down", "up", "right", "left"};

void check_tensor(const at::Tensor& tensor, const char* name, const char* layout, int64_t dim,
                  const at::Tensor& x) {
  TORCH_CHECK_VALUE(tensor.dim() == dim, "line_scan: ", name, " must have ", dim, " dimensions, ",
                    layout, "; got ", tensor.dim(), " with shape ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), "line_scan: ", name,
                   " must have the dtype of x, ", x.scalar_type(), "; got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device() == x.device(), "line_scan: ", name,
                    " must be on the device of x, ", x.device(), "; got ", tensor.device());
}

void check_shape(const at::Tensor& tensor, const char* name, const char* layout,
                 at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, "line_scan: ", name, " must have shape ", layout,
                    " = ", expected, "; got ", tensor.sizes());
}

}  // namespace

Problem check_arguments(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& input_gate,
                        at::IntArrayRef directions, std::optional<int64_t> segment_length) {
  TORCH_CHECK_VALUE(x.dim() == 4, "line_scan: x must have 4 dimensions, (B, H, W, C); got ",
                    x.dim(), " with shape ", x.sizes());
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      "line_scan: x must be float32, float64, float16 or bfloat16; got ", dtype);
  check_tensor(weight, "weight", "(B, H, W, D, 3, G)", 6, x);
  check_tensor(input_gate, "input_gate", "(B, H, W, D, C)", 5, x);

  Problem p{};
  p.batch = x.size(0), p.height = x.size(1), p.width = x.size(2), p.channels = x.size(3);
  p.groups = weight.size(5);
  p.num_directions = static_cast<int64_t>(directions.size());
  TORCH_CHECK_VALUE(p.num_directions >= 1 && p.num_directions <= kMaxDirections,
                    "line_scan: directions must name 1 to 4 directions; got ", p.num_directions);
  for (int64_t d = 0; d < p.num_directions; ++d) {
    TORCH_CHECK_VALUE(directions[d] >= 0 && directions[d] < kMaxDirections,
                      "line_scan: directions must be 0 (down), 1 (up), 2 (right) or 3 (left); got ",
                      directions);
    p.directions[d] = static_cast<Direction>(directions[d]);
    for (int64_t e = 0; e < d; ++e) {
      TORCH_CHECK_VALUE(directions[e] != directions[d],
                        "line_scan: directions must not repeat; got '",
                        kDirectionNames[directions[d]], "' twice");
    }
  }
  TORCH_CHECK_VALUE(
      p.groups >= 1 && p.channels % p.groups == 0, "line_scan: weight has G = ", p.groups,
      " channel groups (its last axis), which must divide the ", p.channels, " channels of x");
  check_shape(weight, "weight", "(B, H, W, D, 3, G)",
              {p.batch, p.height, p.width, p.num_directions, 3, p.groups});
  check_shape(input_gate, "input_gate", "(B, H, W, D, C)",
              {p.batch, p.height, p.width, p.num_directions, p.channels});
  TORCH_CHECK_VALUE(!segment_length || *segment_length >= 1,
                    "line_scan: segment_length must be None or at least 1 line; got ",
                    segment_length.value_or(0));
  // No axis is longer than this, so the state never restarts.
  p.segment_length = segment_length.value_or(std::max<int64_t>({p.height, p.width, 1}));
  return p;
}

Problem check_backward_arguments(const at::Tensor& grad_h, const at::Tensor& x,
                                 const at::Tensor& weight, const at::Tensor& input_gate,
                                 const at::Tensor& h, at::IntArrayRef directions,
                                 std::optional<int64_t> segment_length) {
  const Problem p = check_arguments(x, weight, input_gate, directions, segment_length);
  check_tensor(grad_h, "grad_h", "(B, H, W, D, C)", 5, x);
  check_tensor(h, "h", "(B, H, W, D, C)", 5, x);
  check_shape(grad_h, "grad_h", "(B, H, W, D, C)", input_gate.sizes());
  check_shape(h, "h", "(B, H, W, D, C)", input_gate.sizes());
  return p;
}

at::Tensor with_dense_channels(const at::Tensor& tensor) {
  // Only the last axis has to be dense: a slice of a joint projection needs no copy.
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

#ifndef CGSPN_WITH_CUDA
namespace {

constexpr const char* kNoCuda =
    "line_scan: cgspn_seg was built without its CUDA kernels, but x is on a CUDA device. Install a "
    "CUDA toolkit that matches your PyTorch (torch.version.cuda), then build again: `make build`, "
    "or `FORCE_CUDA=1 pip install -e . --no-build-isolation`; or move the model and its inputs to "
    "the CPU";

at::Tensor line_scan_no_cuda(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             at::IntArrayRef, std::optional<int64_t>) {
  TORCH_CHECK(false, kNoCuda);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> line_scan_backward_no_cuda(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    at::IntArrayRef, std::optional<int64_t>) {
  TORCH_CHECK(false, kNoCuda);
}

TORCH_LIBRARY_IMPL(cgspn_seg, CUDA, m) {
  m.impl("line_scan", &line_scan_no_cuda);
  m.impl("line_scan_backward", &line_scan_backward_no_cuda);
}

}  // namespace
#endif

TORCH_LIBRARY(cgspn_seg, m) {
  m.def(
      "line_scan(Tensor x, Tensor weight, Tensor input_gate, int[] directions, int? "
      "segment_length=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "line_scan_backward(Tensor grad_h, Tensor x, Tensor weight, Tensor input_gate, Tensor h, "
      "int[] directions, "
      "int? segment_length=None) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

}  // namespace cgspn_seg

// Importing cgspn_seg._C runs the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
