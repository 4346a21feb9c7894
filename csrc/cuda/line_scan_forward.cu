#include "launch.cuh"
#include "scan_forward.cuh"

namespace cgspn_seg {

cudaError_t kernels_have_clusters(bool* result) {
  cudaFuncAttributes attributes{};
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, scan_forward<float, 1, false, 1, 1, 1>);
  *result = attributes.ptxVersion >= 90;
  return error;
}

template <typename T>
cudaError_t launch_forward(const Problem& p, const ForwardTensors<T>& tensors, const Plan& plan,
                           cudaStream_t stream) {
  return dispatch_plan<T>(plan, [&](auto channels, auto items) {
    const auto launch = [&](auto shared) {
      constexpr bool kShared = shared();
      // The combinations that the table of plans has.
      constexpr int kBytes = channels() * sizeof(T);
      if constexpr (items() == 1 && kBytes == 8) {
        if (plan.teams > 1)
          return launch_plan(scan_forward<T, channels(), kShared, 1, kLongPeriod, kManyTeams>, plan,
                             stream, p, tensors);
      }
      if constexpr (items() == 1 && kBytes == 16 && kShared) {
        if (plan.period > 1)
          return launch_plan(scan_forward<T, channels(), kShared, 1, kLongPeriod, 1>, plan, stream,
                             p, tensors);
      }
      return launch_plan(scan_forward<T, channels(), kShared, items(), 1, 1>, plan, stream, p,
                         tensors);
    };
    return p.group_size() > 1 ? launch(std::true_type{}) : launch(std::false_type{});
  });
}

#define CGSPN_INSTANTIATE(T)                                                                    \
  template cudaError_t launch_forward<T>(const Problem&, const ForwardTensors<T>&, const Plan&, \
                                         cudaStream_t);
CGSPN_FOR_EACH_TYPE(CGSPN_INSTANTIATE)
#undef CGSPN_INSTANTIATE

}  // namespace cgspn_seg
