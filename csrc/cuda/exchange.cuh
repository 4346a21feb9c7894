// How the blocks that share a line give each other the states at their strips' edges: stores into
// the neighbour's shared memory that count themselves on a barrier there, so that nobody waits for
// more than the edges it needs. GPUs before sm_90 cannot; plans for them have one block a line.
#pragma once

#include "mbarrier.cuh"
#include "plan.h"

namespace cgspn_seg {

class EdgeExchange {
 public:
  // `memory`: kExchangeBytes of shared memory, for two barriers that exchanges use in turn: a
  // neighbour may send its next edges before the other neighbour has sent its last. `bytes`: what
  // the neighbours send to this block each time.
  __device__ EdgeExchange(SharedAddress memory, int bytes) : barriers_(memory), bytes_(bytes) {}

  // Every block of the cluster calls this before any sends.
  __device__ void start() const {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) init_mbarrier(barriers_ + 8 * i, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

  // Writes state to an address in the block `offset` further in the cluster, as part of the
  // exchange that is the `index`-th.
  template <typename A, int V>
  __device__ void send(int index, SharedAddress address, int plane_bytes,
                       const Channels<A, V>& channels, int offset) const {
#if __CUDA_ARCH__ >= 900
    unsigned rank, barrier, target;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    rank += offset;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(barrier)
        : "r"(barriers_ + 8 * (index & 1)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(target) : "r"(address), "r"(rank));
#pragma unroll
    for (int plane = 0; plane < State<A, V>::kPlanes; ++plane)
      send_word(target + plane * plane_bytes, barrier, State<A, V>::part(channels, plane));
#endif
  }

  // Returns when the neighbours' edges are there. One thread of those that wait is the `leader`.
  // The wait acquires for this block alone: the edges lie in its own memory, and a wider scope
  // would empty the first-level cache each time.
  __device__ void receive(int index, bool leader) const {
#if __CUDA_ARCH__ >= 900
    const SharedAddress barrier = barriers_ + 8 * (index & 1);
    if (leader) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"(bytes_)
                   : "memory");
    }
    wait_for_mbarrier(barrier, index >> 1 & 1);
#endif
  }

 private:
#if __CUDA_ARCH__ >= 900
  template <typename A, int N>
  __device__ static void send_word(unsigned target, unsigned barrier, const Stored<A, N>& sent) {
    const auto& words = sent.words;
    if constexpr (sizeof(A) * N == 16) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
          "[%5];" ::"r"(target),
          "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(barrier)
          : "memory");
    } else if constexpr (sizeof(A) * N == 8) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, "
          "[%3];" ::"r"(target),
          "r"(words[0]), "r"(words[1]), "r"(barrier)
          : "memory");
    } else {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(target),
          "r"(words[0]), "r"(barrier)
          : "memory");
    }
  }
#endif

  SharedAddress barriers_;
  int bytes_;
};

}  // namespace cgspn_seg
