// The PyTorch side of the line scan: what a device's implementation receives and returns.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "line_scan.h"

namespace cgspn_seg {

// Checks every argument and raises ValueError or TypeError naming the first that is wrong.
Problem check_arguments(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& input_gate,
                        at::IntArrayRef directions, std::optional<int64_t> segment_length);
Problem check_backward_arguments(const at::Tensor& grad_h, const at::Tensor& x,
                                 const at::Tensor& weight, const at::Tensor& input_gate,
                                 const at::Tensor& h, at::IntArrayRef directions,
                                 std::optional<int64_t> segment_length);

// The tensor itself if its last axis is dense, else a contiguous copy.
at::Tensor with_dense_channels(const at::Tensor& tensor);

// Addressing for a tensor with a dense last axis. T is the type its elements are read as, which may
// be const, and which a device may call by a name of its own (__half for at::Half).
template <typename T>
Pixels<T> pixels(const at::Tensor& tensor) {
  const auto stride = [&](int64_t axis) {
    return axis < tensor.dim() - 1 ? tensor.stride(axis) : 0;
  };
  return {
      static_cast<T*>(tensor.data_ptr()), stride(0), stride(1), stride(2), stride(3), stride(4)};
}

}  // namespace cgspn_seg
