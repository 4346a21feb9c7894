// Barriers in shared memory (PTX: mbarrier): some threads arrive, others wait for the phase to end.
#pragma once

#include "memory.cuh"

namespace cgspn_seg {

// One thread does this; a barrier of the block's threads comes before anybody else uses it.
__device__ inline void init_mbarrier(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void arrive_at_mbarrier(SharedAddress barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier)
               : "memory");
}

// Returns when the phase with this parity, of phases counted from 0, has ended.
__device__ inline void wait_for_mbarrier(SharedAddress barrier, unsigned parity) {
  unsigned done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p;\n"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
#else
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
#endif
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

}  // namespace cgspn_seg
