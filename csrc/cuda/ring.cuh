// The ring of lines that a block has fetched ahead.
#pragma once

#include "memory.cuh"
#include "plan.h"

namespace cgspn_seg {

// For each stage, what every thread fetched for kLines lines: its channels of some tensors, and the
// logits of three taps. A warp's slots lie together, so that a thread reaches all of its own by
// constant distances from two addresses.
template <Pass kPass, typename T, int V, bool kShared, int kLines = 1>
struct Ring {
  enum Tensor { kX, kGate, kH, kGradH };  // the last two backward only
  static constexpr int kTensors = kPass == Pass::kForward ? 2 : 4;
  static constexpr int kLogits = kShared ? 1 : V;  // of a tap that a thread reads
  static constexpr int kSlot = slot_bytes(sizeof(T), V);
  static constexpr int kLogitSlot = slot_bytes(sizeof(T), kLogits);
  static constexpr int kItemBytes = item_bytes(kPass, sizeof(T), V, kShared);
  static constexpr int kWarpBytes = 32 * kItemBytes * kLines;

  SharedAddress memory;
  int stage_bytes;

  __device__ Ring(SharedAddress memory, int items)
      : memory(memory), stage_bytes(items / 32 * kWarpBytes) {}

  __device__ SharedAddress end() const { return memory + kStages * stage_bytes; }
  // The ring of another team, one of equal rings that follow each other.
  __device__ Ring of_team(int team) const {
    Ring ring = *this;
    ring.memory += team * kStages * stage_bytes;
    return ring;
  }
  // Where an item's slots begin, in stage 0: those of the channels, those of the logits.
  __device__ SharedAddress channels(int item) const {
    return memory + item / 32 * kWarpBytes + item % 32 * kSlot;
  }
  __device__ SharedAddress logits(int item) const {
    return memory + item / 32 * kWarpBytes + 32 * kTensors * kSlot + item % 32 * kLogitSlot;
  }
  __device__ static constexpr int of(Tensor tensor, int line = 0) {
    return 32 * (tensor * kSlot + line * kItemBytes);
  }
  __device__ static constexpr int of_tap(int tap, int line = 0) {
    return 32 * (tap * kLogitSlot + line * kItemBytes);
  }
  // The bytes from stage 0 to the stage before or after the one that lies at `stage`.
  __device__ int before(int stage) const {
    return stage == 0 ? (kStages - 1) * stage_bytes : stage - stage_bytes;
  }
  __device__ int after(int stage) const {
    return stage == (kStages - 1) * stage_bytes ? 0 : stage + stage_bytes;
  }
};

}  // namespace cgspn_seg
