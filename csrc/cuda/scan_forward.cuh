// The line scan on the GPU, forward: h of every pixel, for all directions in one launch.
//
// A block walks over the lines with the state of the last one in shared memory. Each thread has the
// same position and channels in every line, copies what it will need some lines ahead into places
// of its own in a ring of shared memory, so that these copies need no barrier, and turns logits
// into coefficients before the state of the line before is needed.
#pragma once

#include "exchange.cuh"
#include "line_scan_kernels.h"
#include "normalization.cuh"
#include "ring.cuh"
#include "teams.cuh"
#include "tile.cuh"

namespace cgspn_seg {

// kPeriod: so many lines are fetched and prepared together. Blocks that share a line exchange their
// edges once in so many lines, and until then compute the states beyond them twice.
// kTeams: so many teams of threads take turns; while one scans its kPeriod lines, the others
// prepare theirs. It pays where there are too few blocks to keep a multiprocessor busy.
template <typename T, int V, bool kShared, int kItems, int kPeriod, int kTeams>
__global__ void __launch_bounds__(max_threads(Pass::kForward))
    scan_forward(const __grid_constant__ Problem p, const __grid_constant__ ForwardTensors<T> t,
                 const __grid_constant__ Plan plan) {
  using A = Accumulator<T>;
  using Ring = Ring<Pass::kForward, T, V, kShared, kPeriod>;
  using State = State<A, V>;
  constexpr int kLogits = Ring::kLogits;
  const bool is_split = plan.strips > 1;
  const int halo = is_split ? kPeriod - 1 : 0;
  const Tile tile(p, plan, halo);
  const int team = kTeams > 1 ? threadIdx.x / plan.threads : 0;
  const int thread = kTeams > 1 ? threadIdx.x % plan.threads : threadIdx.x;

  const Ring rings(shared_memory(), plan.threads * kItems);
  const Ring ring = rings.of_team(team);
  const EdgeExchange exchange(rings.of_team(kTeams - 1).end(),
                              tile.received_positions(kPeriod) * plan.lanes * State::kBytes);
  // Lines of state, with one more position on either side. Those that the neighbours complete with
  // their edges alternate between the first two.
  const SharedAddress turns = rings.of_team(kTeams - 1).end() + kExchangeBytes;
  const SharedAddress lines = turns + kTeamBarrierBytes;
  TeamBarrier<kTeams> barrier(turns, team, plan.threads);
  const int plane_bytes = (plan.columns + 2) * plan.lanes * State::kChunkBytes;
  const int line_bytes = plane_bytes * State::kPlanes;
  const int pixel_bytes = plan.lanes * State::kChunkBytes;
  clear_shared(lines, state_lines(kPeriod) * line_bytes);

  const Stream<const T> x(t.x, p, tile, p.channels), gate(t.gate, p, tile, p.channels);
  const Stream<const T> weight(t.weight, p, tile, p.groups);
  const Stream<T> h(t.h, p, tile, p.channels);
  const int group_size = static_cast<int>(p.group_size());
  Item items[kItems];
  const T *next_x[kItems], *next_gate[kItems], *next_weight[kItems];  // to be fetched
  T* next_h[kItems];                                                  // to be written
  SharedAddress slots[kItems], logit_slots[kItems], states[kItems];
  bool sends_left[kItems], sends_right[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const Item item = items[k] = Item(tile, plan, thread + k * plan.threads);
    const int first_line = team * kPeriod;
    next_x[k] = x.at(first_line, item.position, item.channel);
    next_gate[k] = gate.at(first_line, item.position, item.channel);
    next_weight[k] = weight.at(first_line, item.position, item.channel / group_size);
    next_h[k] = h.at(first_line, item.position, item.channel);
    slots[k] = ring.channels(item.index);
    logit_slots[k] = ring.logits(item.index);
    states[k] = lines + pixel_bytes + item.index * State::kChunkBytes;
    sends_left[k] =
        item.distance == 0 && tile.has_left() && item.position < tile.core_begin + kPeriod;
    sends_right[k] =
        item.distance == 0 && tile.has_right() && item.position >= tile.core_end - kPeriod;
  }
  // The i-th line after an exchange is computed as far beyond the strip as later ones depend on it.
  const auto is_computed = [&](int k, int first_line, int i) {
    const int reach = kPeriod > 1 && is_split ? kPeriod - 1 - i : 0;
    return first_line + i < tile.num_lines && items[k].distance <= reach;
  };

  const auto fetch = [&](int first_line, int stage) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const SharedAddress slot = slots[k] + stage, logit_slot = logit_slots[k] + stage;
#pragma unroll
      for (int i = 0; i < kPeriod; ++i) {
        if (is_computed(k, first_line, i)) {
          copy_async<V>(slot + Ring::of(Ring::kX, i), next_x[k], x.last);
          copy_async<V>(slot + Ring::of(Ring::kGate, i), next_gate[k], gate.last);
#pragma unroll
          for (int tap = 0; tap < 3; ++tap)
            copy_async<kLogits>(logit_slot + Ring::of_tap(tap, i),
                                next_weight[k] + tap * weight.tap_stride, weight.last);
        }
        next_x[k] += x.line_stride;
        next_gate[k] += gate.line_stride;
        next_weight[k] += weight.line_stride;
      }
      if constexpr (kTeams > 1) {  // past the other teams' lines
        next_x[k] += (kTeams - 1) * kPeriod * x.line_stride;
        next_gate[k] += (kTeams - 1) * kPeriod * gate.line_stride;
        next_weight[k] += (kTeams - 1) * kPeriod * weight.line_stride;
      }
    }
    commit_copies();
  };

  // h = (prev h[-1] + mid h[0] + next h[+1]) inverse + input, of the lines to come.
  Channels<A, V> prev[kPeriod][kItems], mid[kPeriod][kItems], next[kPeriod][kItems];
  Channels<A, V> inverse[kPeriod][kItems], input[kPeriod][kItems];
  const auto prepare = [&](int first_line, int stage) {
#pragma unroll
    for (int i = 0; i < kPeriod; ++i) {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        if (!is_computed(k, first_line, i)) continue;
        const Item& item = items[k];
        const int line = first_line + i;
        const SharedAddress slot = slots[k] + stage, logit_slot = logit_slots[k] + stage;
        input[i][k] =
            widen(copied<V>(slot + Ring::of(Ring::kX, i), x.at(line, item.position, item.channel)));
        const auto open = widen(
            copied<V>(slot + Ring::of(Ring::kGate, i), gate.at(line, item.position, item.channel)));
        const T* const logits = weight.at(line, item.position, item.channel / group_size);
        Channels<A, kLogits> e[3];
#pragma unroll
        for (int tap = 0; tap < 3; ++tap)
          e[tap] = exponentials(
              copied<kLogits>(logit_slot + Ring::of_tap(tap, i), logits + tap * weight.tap_stride));
        const A has_prev = item.position > 0, has_next = item.position + 1 < tile.num_positions;
        Shares<A> c;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (v < kLogits) c = shares(Taps<A>{e[0][v], e[1][v], e[2][v]}, has_prev, has_next);
          prev[i][k][v] = c.share.prev, mid[i][k][v] = c.share.mid, next[i][k][v] = c.share.next;
          inverse[i][k][v] = c.inverse;
          input[i][k][v] *= open[v];
        }
      }
    }
  };

  constexpr int kTurn = kTeams * kPeriod;
#pragma unroll 1
  for (int s = 0; s < kStages; ++s) fetch(team * kPeriod + s * kTurn, s * ring.stage_bytes);
  __syncthreads();
  if (is_split) exchange.start();

  int stage = 0, line_in_segment = team * kPeriod % tile.segment_length;
#pragma unroll 1
  for (int first_line = team * kPeriod; first_line < tile.num_lines; first_line += kTurn) {
    wait_for_copies<kStages - 1>();
    prepare(first_line, stage);
    fetch(first_line + kStages * kTurn, stage);
    stage = ring.after(stage);
    const int index = first_line / kPeriod;
    if (index > 0) {
      barrier.take_over();
      if (is_split) exchange.receive(index - 1, thread == 0);
    }

    const bool exchanges = is_split && first_line + kPeriod < tile.num_lines;
    const int exchanged = (index & 1) * line_bytes;
    int before = line_bytes - exchanged;  // lines of state
#pragma unroll
    for (int i = 0; i < kPeriod; ++i) {
      const int here = i == kPeriod - 1 ? exchanged : (2 + i % 2) * line_bytes;
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        if (is_computed(k, first_line, i)) {
          Channels<A, V>& result = input[i][k];
          if (line_in_segment != 0) {
            const SharedAddress source = states[k] + before;
            const auto h_prev = State::get(source - pixel_bytes, plane_bytes);
            const auto h_mid = State::get(source, plane_bytes);
            const auto h_next = State::get(source + pixel_bytes, plane_bytes);
#pragma unroll
            for (int v = 0; v < V; ++v)
              result[v] += inverse[i][k][v] * (prev[i][k][v] * h_prev[v] + mid[i][k][v] * h_mid[v] +
                                               next[i][k][v] * h_next[v]);
          }
          State::set(states[k] + here, plane_bytes, result);
          if (i == kPeriod - 1 && exchanges) {
            const int shift = tile.strip_length * pixel_bytes;
            if (sends_left[k])
              exchange.send(index, states[k] + here + shift, plane_bytes, result, -1);
            if (sends_right[k])
              exchange.send(index, states[k] + here - shift, plane_bytes, result, +1);
          }
        }
      }
      before = here;
      if (++line_in_segment == tile.segment_length) line_in_segment = 0;
      if (i < kPeriod - 1) barrier.sync();
    }
    if (first_line + kPeriod < tile.num_lines) barrier.hand_over();
    if (kTeams > 1) line_in_segment = (line_in_segment + kTurn - kPeriod) % tile.segment_length;

    // Nobody waits for these stores.
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
#pragma unroll
      for (int i = 0; i < kPeriod; ++i) {
        if (first_line + i < tile.num_lines && items[k].distance == 0)
          store<T, V>(next_h[k], input[i][k]);
        next_h[k] += h.line_stride;
      }
      if (kTeams > 1) next_h[k] += (kTurn - kPeriod) * h.line_stride;
    }
  }
}

}  // namespace cgspn_seg
