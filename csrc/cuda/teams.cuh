// Barriers of teams of threads that take turns. With one team, one barrier does for all.
#pragma once

#include "mbarrier.cuh"

namespace cgspn_seg {

template <int kTeams>
class TeamBarrier {
 public:
  // `memory`: kTeamBarrierBytes of shared memory. `threads`: of a team, whole warps. A barrier of
  // the block's threads comes before the first turn.
  __device__ TeamBarrier(SharedAddress memory, int team, int threads)
      : turns_(memory), team_(team), threads_(threads) {
    if (kTeams > 1 && threadIdx.x == 0) {
      for (int i = 0; i < kTeams; ++i) init_mbarrier(memory + 8 * i, threads);
    }
  }

  // Among the threads of this team.
  __device__ void sync() const {
    if constexpr (kTeams == 1) {
      __syncthreads();
    } else {
      asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(1 + team_), "r"(threads_) : "memory");
    }
  }
  // The team before has handed over,
  __device__ void take_over() {
    if constexpr (kTeams == 1) {
      __syncthreads();
    } else {
      wait_for_mbarrier(turns_ + 8 * team_, parity_);
      parity_ ^= 1;
    }
  }
  // and this one hands over to the next, without waiting. Each thread arrives for itself: one for
  // its whole warp would have to wait for it.
  __device__ void hand_over() const {
    if constexpr (kTeams > 1)
      arrive_at_mbarrier(turns_ + 8 * (team_ + 1 == kTeams ? 0 : team_ + 1));
  }

 private:
  SharedAddress turns_;  // a barrier for each team, whose phases are its turns
  int team_, threads_;
  unsigned parity_ = 0;
};

}  // namespace cgspn_seg
