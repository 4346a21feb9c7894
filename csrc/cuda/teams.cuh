// Barriers of teams of threads that take turns. With one team, one barrier does for all.
#pragma once

namespace cgspn_seg {

// `threads`: of a team, whole warps.
template <int kTeams>
struct TeamBarrier {
  // Among the threads of a team.
  __device__ static void sync(int team, int threads) {
    if constexpr (kTeams == 1) {
      __syncthreads();
    } else {
      asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(1 + kTeams + team), "r"(threads)
                   : "memory");
    }
  }
  // The team before has handed over,
  __device__ static void take_over(int team, int threads) {
    if constexpr (kTeams == 1) {
      __syncthreads();
    } else {
      asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(1 + team), "r"(2 * threads) : "memory");
    }
  }
  // and this one hands over to the next, without waiting.
  __device__ static void hand_over(int team, int threads) {
    if constexpr (kTeams > 1) {
      const int next = team + 1 == kTeams ? 0 : team + 1;
      asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(1 + next), "r"(2 * threads)
                   : "memory");
    }
  }
};

}  // namespace cgspn_seg
