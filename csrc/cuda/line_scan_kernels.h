// What the CUDA kernels take from the PyTorch side. No PyTorch header: the kernels compile with
// nvcc alone.
#pragma once

#include <cuda_runtime_api.h>

#include "../line_scan.h"
#include "plan.h"

namespace cgspn_seg {

template <typename T>
struct ForwardTensors {
  Pixels<const T> x, weight, gate;
  Pixels<T> h;
};

template <typename T>
struct BackwardTensors {
  Pixels<const T> x, weight, gate, grad_h, h;
  Pixels<T> grad_x, grad_weight, grad_gate;
  // Workspaces. λ ⊙ dL/dh of each direction, (B, H, W, D, C); grad_x itself if there is but one.
  Pixels<T> grad_input;
  // dL/dw summed over some channels of each group, (B, H, W, D, 3, C / `reduced channels`); without
  // data where a block sums whole groups.
  Pixels<Accumulator<T>> partial_sums;
};

// Whether the kernels that this GPU runs were compiled for sm_90 or later, and so with clusters: a
// newer GPU may run those of an older one.
cudaError_t kernels_have_clusters(bool* result);

// Both enqueue their work on `stream` and return what the launches did. Instantiated for float,
// double, __half and __nv_bfloat16.
template <typename T>
cudaError_t launch_forward(const Problem& problem, const ForwardTensors<T>& tensors,
                           const Plan& plan, cudaStream_t stream);
template <typename T>
cudaError_t launch_backward(const Problem& problem, const BackwardTensors<T>& tensors,
                            const Plan& plan, cudaStream_t stream);

// The types of storage, for explicit instantiation.
#define CGSPN_FOR_EACH_TYPE(X) X(float) X(double) X(__half) X(__nv_bfloat16)

}  // namespace cgspn_seg
