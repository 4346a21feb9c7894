// What a block works on: a strip of every line of one direction of one image, for a slice of the
// channels. The strips of a line form a cluster.
#pragma once

#include <climits>

#include "../line_scan.h"
#include "plan.h"

namespace cgspn_seg {

struct Tile {
  int64_t b, d;
  int first_channel;  // of the slice
  Walk walk;
  int num_lines, num_positions, segment_length;
  int core_begin, core_end;  // the positions whose results the block writes
  int begin;                 // with those it needs from the strip before
  int strip_length;          // of all strips but the last

  __device__ Tile(const Problem& p, const Plan& plan, int halo) : walk(p, direction(p, plan)) {
    unsigned index = blockIdx.x;
    const int strip = index % plan.strips;
    index /= plan.strips;
    const int slice_channels = plan.lanes * plan.channels_per_thread;
    const unsigned slices = static_cast<unsigned>(p.channels) / slice_channels;
    first_channel = index % slices * slice_channels;
    index /= slices;
    d = index % p.num_directions;
    b = index / p.num_directions;
    num_lines = walk.num_lines;
    num_positions = walk.num_positions;
    segment_length = min(walk.segment_length, int64_t{num_lines});
    strip_length = (num_positions + plan.strips - 1) / plan.strips;
    core_begin = min(strip * strip_length, num_positions);  // strips may be left over, empty
    core_end = min(core_begin + strip_length, num_positions);
    begin = core_begin - halo;
  }

  __device__ bool has_left() const { return core_begin > 0 && core_begin < core_end; }
  __device__ bool has_right() const { return core_end < num_positions; }
  // The positions whose state the neighbours send, of up to `width` on either side.
  __device__ int received_positions(int width) const {
    return (has_left() ? width : 0) + (has_right() ? min(width, num_positions - core_end) : 0);
  }

 private:
  __device__ static int64_t direction(const Problem& p, const Plan& plan) {
    const unsigned slices =
        static_cast<unsigned>(p.channels) / (plan.lanes * plan.channels_per_thread);
    return blockIdx.x / plan.strips / slices % p.num_directions;
  }
};

// The pixel and channels that a thread has in every line.
struct Item {
  int index;     // in the block: channels vary fastest
  int position;  // along the line
  int channel;   // the first of the thread's
  int distance;  // positions from the core; far beyond any halo outside the image

  Item() = default;
  __device__ Item(const Tile& tile, const Plan& plan, int index) : index(index) {
    position = tile.begin + index / plan.lanes;
    channel = tile.first_channel + index % plan.lanes * plan.channels_per_thread;
    distance = max(max(tile.core_begin - position, position - (tile.core_end - 1)), 0);
    if (position < 0 || position >= tile.num_positions) distance = INT_MAX;
  }
};

// A tensor along a scan: where its lines lie.
template <typename T>
struct Stream {
  T* first;  // line 0, position 0, channel 0
  T* last;   // of the whole tensor
  int64_t line_stride, position_stride, tap_stride;

  // `channels`: the length of the tensor's last axis.
  __device__ Stream(const Pixels<T>& pixels, const Problem& p, const Tile& tile, int64_t channels)
      : tap_stride(pixels.tap_stride) {
    const Walk& walk = tile.walk;
    first = pixels.at(tile.b, walk.row(0, 0), walk.col(0, 0), tile.d);
    line_stride = walk.lines_are_rows ? pixels.row_stride : pixels.col_stride;
    if (walk.reversed) line_stride = -line_stride;
    position_stride = walk.lines_are_rows ? pixels.col_stride : pixels.row_stride;
    last = pixels.at(p.batch - 1, p.height - 1, p.width - 1, p.num_directions - 1) +
           2 * tap_stride + channels - 1;
  }

  __device__ T* at(int line, int position, int channel) const {
    return first + line * line_stride + position * position_stride + channel;
  }
};

}  // namespace cgspn_seg
