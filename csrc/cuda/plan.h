// How a line scan is cut into blocks and threads. No CUDA header: a plan needs no GPU.
#pragma once

#include <cstdint>
#include <optional>

#include "../line_scan.h"

namespace cgspn_seg {

constexpr int kStages = 3;      // of the ring that fetches ahead
constexpr int kManyItems = 4;   // pixel positions a thread may have, where lines are very long
constexpr int kMaxStrips = 8;   // blocks in a cluster that every GPU with clusters can run
constexpr int kLongPeriod = 2;  // see scan_forward
constexpr int kManyTeams = 4;   // see scan_forward

enum class Pass { kForward, kBackward };

// So that a thread may have 96 or 128 registers.
CGSPN_INLINE constexpr int max_threads(Pass pass) { return pass == Pass::kForward ? 640 : 512; }

struct Plan {
  int channels_per_thread;
  int lanes;             // threads a pixel; a block scans lanes * channels_per_thread channels
  int strips;            // blocks a line, which form a cluster
  int period;            // lines between two exchanges of the strips' edges
  int teams;             // of threads that take turns
  int items_per_thread;  // 1 or kManyItems
  // From here on computed.
  int columns;           // positions of the widest strip, with those read of its neighbours
  int threads;           // of a team
  int reduced_channels;  // backward: channels of a group whose products with h a block adds up
  int64_t blocks;
  int64_t shared_bytes;
};

struct Device {
  int multiprocessors;
  int64_t shared_bytes_per_block;
  bool has_clusters;  // blocks that reach each other's shared memory: sm_90 and later
};

struct Layout {
  int element_bytes, accumulator_bytes;
  int aligned_channels;  // so many channels of every tensor can be accessed at once
};

// No axis may be longer: lines, positions and channels are counted in 32 bits on the GPU.
constexpr int64_t kMaxExtent = 1 << 30;

// The way to scan `p`, which has no empty axis, or nothing where its lines are longer than the
// shared memory allows, or its blocks more than a launch has.
std::optional<Plan> make_plan(Pass pass, const Problem& p, const Layout& layout,
                              const Device& device);

// Bytes of the ring for each item and line: a forward thread fetches x, λ and three logits, a
// backward one h and its gradient too.
CGSPN_INLINE constexpr int slot_bytes(int element_bytes, int channels) {
  return element_bytes * channels < 4 ? 4 : element_bytes * channels;
}
CGSPN_INLINE constexpr int item_bytes(Pass pass, int element_bytes, int channels,
                                      bool shared_weights) {
  return (pass == Pass::kForward ? 2 : 4) * slot_bytes(element_bytes, channels) +
         3 * slot_bytes(element_bytes, shared_weights ? 1 : channels);
}

// Lines of state in shared memory: two that neighbouring strips complete in turn, and what a longer
// period has in between.
CGSPN_INLINE constexpr int state_lines(int period) { return period < 3 ? period + 1 : 4; }

// Shared memory for barriers: of EdgeExchange, and of TeamBarrier.
constexpr int kExchangeBytes = 16;
constexpr int kTeamBarrierBytes = 8 * kManyTeams;

}  // namespace cgspn_seg
