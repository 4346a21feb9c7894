// The line scan on the GPU, backward: the adjoint of h, walked in the opposite order, and from it
// the gradients of the coefficients and of λx, all in one pass over the lines.
#pragma once

#include "exchange.cuh"
#include "line_scan_kernels.h"
#include "normalization.cuh"
#include "ring.cuh"
#include "tile.cuh"

namespace cgspn_seg {

// The sum over `count` neighbouring threads, a power of two, always in the same order.
template <typename A>
__device__ A sum_over_threads(A value, int count) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned mask = count == 32 ? ~0u : ((1u << count) - 1) << (lane & ~(count - 1));
  for (int distance = 1; distance < count; distance *= 2)
    value += __shfl_xor_sync(mask, value, distance);
  return value;
}

template <typename T, int V, bool kShared, int kItems>
__global__ void __launch_bounds__(max_threads(Pass::kBackward))
    scan_backward(const __grid_constant__ Problem p, const __grid_constant__ BackwardTensors<T> t,
                  const __grid_constant__ Plan plan) {
  using A = Accumulator<T>;
  using Ring = Ring<Pass::kBackward, T, V, kShared>;
  using State = State<A, V>;
  constexpr int kLogits = Ring::kLogits;
  const Tile tile(p, plan, plan.strips > 1 ? 1 : 0);  // h is read of one more position
  const int last = tile.num_lines - 1;

  const bool is_split = plan.strips > 1;
  const Ring ring(shared_memory(), plan.threads * kItems);
  EdgeExchange exchange(ring.end(), tile.received_positions(1) * plan.lanes * State::kBytes);
  // What a line's adjoints give to the positions before and after theirs in the line scanned before
  // it; two lines of each in turn, with one more position on either side.
  const SharedAddress lines = ring.end() + kExchangeBytes;
  const int plane_bytes = (plan.columns + 2) * plan.lanes * State::kChunkBytes;
  const int line_bytes = plane_bytes * State::kPlanes;
  const int pixel_bytes = plan.lanes * State::kChunkBytes;
  clear_shared(lines, 4 * line_bytes);
  const auto to_prev_of = [&](int line) { return (line & 1) * line_bytes; };
  const auto to_next_of = [&](int line) { return (2 + (line & 1)) * line_bytes; };

  const Stream<const T> x(t.x, p, tile, p.channels), gate(t.gate, p, tile, p.channels);
  const Stream<const T> weight(t.weight, p, tile, p.groups);
  const Stream<const T> grad_h(t.grad_h, p, tile, p.channels), h(t.h, p, tile, p.channels);
  const Stream<T> grad_input(t.grad_input, p, tile, p.channels);
  const Stream<T> grad_gate(t.grad_gate, p, tile, p.channels);
  const Stream<T> grad_weight(t.grad_weight, p, tile, p.groups);
  const Stream<A> partial_sums(t.partial_sums, p, tile, p.channels / plan.reduced_channels);
  const int group_size = static_cast<int>(p.group_size());
  Item items[kItems];
  const T *next_x[kItems], *next_gate[kItems], *next_weight[kItems];  // to be fetched
  const T *next_grad_h[kItems], *next_h[kItems];
  T *next_grad_input[kItems], *next_grad_gate[kItems], *next_grad_weight[kItems];  // to be written
  SharedAddress slots[kItems], logit_slots[kItems], states[kItems];
  // The slots of the neighbours' h. Where there is no neighbour, its coefficient is zero, whatever
  // is read for its state.
  SharedAddress prev_slots[kItems], next_slots[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const Item item = items[k] = Item(tile, plan, threadIdx.x + k * plan.threads);
    next_x[k] = x.at(last, item.position, item.channel);
    next_gate[k] = gate.at(last, item.position, item.channel);
    next_weight[k] = weight.at(last, item.position, item.channel / group_size);
    next_grad_h[k] = grad_h.at(last, item.position, item.channel);
    next_h[k] = h.at(last - 1, item.position, item.channel);
    next_grad_input[k] = grad_input.at(last, item.position, item.channel);
    next_grad_gate[k] = grad_gate.at(last, item.position, item.channel);
    next_grad_weight[k] = grad_weight.at(last, item.position, item.channel / group_size);
    slots[k] = ring.channels(item.index);
    logit_slots[k] = ring.logits(item.index);
    states[k] = lines + pixel_bytes + item.index * State::kChunkBytes;
    prev_slots[k] = ring.channels(item.position > 0 ? item.index - plan.lanes : item.index);
    next_slots[k] = ring.channels(item.position + 1 < tile.num_positions ? item.index + plan.lanes
                                                                         : item.index);
  }

  using LogitGradients = Channels<A, kLogits>[3];
  const auto write_logits = [&](const Item& item, int line, T* target, const LogitGradients& grad) {
    if (kShared && item.channel % plan.reduced_channels != 0) return;
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
      if constexpr (kShared) {
        if (t.partial_sums.data != nullptr) {
          partial_sums.at(line, item.position,
                          item.channel / plan.reduced_channels)[tap * partial_sums.tap_stride] =
              grad[tap][0];
          continue;
        }
      }
      store<T, kLogits>(target + tap * grad_weight.tap_stride, grad[tap]);
    }
  };

  int fetched_in_segment = last % tile.segment_length;  // of the line to be fetched
  const auto fetch = [&](int line, int stage) {
    const bool starts = fetched_in_segment == 0;
    fetched_in_segment = starts ? tile.segment_length - 1 : fetched_in_segment - 1;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const Item& item = items[k];
      if (line >= 0 && !starts && item.distance <= 1)
        copy_async<V>(slots[k] + stage + Ring::of(Ring::kH), next_h[k], h.last);
      if (line >= 0 && item.distance == 0) {
        copy_async<V>(slots[k] + stage + Ring::of(Ring::kX), next_x[k], x.last);
        copy_async<V>(slots[k] + stage + Ring::of(Ring::kGate), next_gate[k], gate.last);
        copy_async<V>(slots[k] + stage + Ring::of(Ring::kGradH), next_grad_h[k], grad_h.last);
#pragma unroll
        for (int tap = 0; tap < 3; ++tap)
          copy_async<kLogits>(logit_slots[k] + stage + Ring::of_tap(tap),
                              next_weight[k] + tap * weight.tap_stride, weight.last);
      }
      next_x[k] -= x.line_stride;
      next_gate[k] -= gate.line_stride;
      next_grad_h[k] -= grad_h.line_stride;
      next_h[k] -= h.line_stride;
      next_weight[k] -= weight.line_stride;
    }
    commit_copies();
  };

#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) fetch(last - s, s * ring.stage_bytes);
  if (is_split) exchange.start();
  // One stage fewer than in the forward pass: neighbours may still read the last one.
  wait_for_copies<kStages - 2>();
  __syncthreads();

  Channels<A, V> from_same[kItems] = {};  // what the line scanned later gives to this position
  bool receives = false;                  // whether that line belongs to the same segment
  int stage = 0, line_in_segment = last % tile.segment_length;
#pragma unroll 1
  for (int line = last; line >= 0; --line) {
    fetch(line - (kStages - 1), ring.before(stage));
    const bool starts = line_in_segment == 0;
    line_in_segment = starts ? tile.segment_length - 1 : line_in_segment - 1;
    // Also where a segment starts: it keeps a strip from overtaking its neighbours by two lines.
    const bool exchanges = is_split && line > 0;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const Item& item = items[k];
      if (item.distance > 0) continue;
      auto adjoint = widen(copied<V>(slots[k] + stage + Ring::of(Ring::kGradH),
                                     grad_h.at(line, item.position, item.channel)));
      if (receives) {
        const auto from_prev =
            State::get(states[k] + to_next_of(line + 1) - pixel_bytes, plane_bytes);
        const auto from_next =
            State::get(states[k] + to_prev_of(line + 1) + pixel_bytes, plane_bytes);
#pragma unroll
        for (int v = 0; v < V; ++v) adjoint[v] += from_prev[v] + from_same[k][v] + from_next[v];
      }

      Channels<A, V> to_prev{}, to_next{};
      if (!starts) {
        Channels<A, kLogits> grad_logits[3];
        const T* const logits = weight.at(line, item.position, item.channel / group_size);
        Channels<A, kLogits> e[3];
#pragma unroll
        for (int tap = 0; tap < 3; ++tap)
          e[tap] = exponentials(copied<kLogits>(logit_slots[k] + stage + Ring::of_tap(tap),
                                                logits + tap * weight.tap_stride));
        const bool has_prev = item.position > 0, has_next = item.position + 1 < tile.num_positions;
        const auto state = [&](SharedAddress slot, int position) {
          return widen(
              copied<V>(slot + stage + Ring::of(Ring::kH), h.at(line - 1, position, item.channel)));
        };
        const auto h_prev = state(prev_slots[k], item.position - has_prev);
        const auto h_mid = state(slots[k], item.position);
        const auto h_next = state(next_slots[k], item.position + has_next);
        Coefficients<A> c;
        Taps<A> sum{};
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (v < kLogits)
            c = normalize(Taps<A>{e[0][v], e[1][v], e[2][v]}, A(has_prev), A(has_next));
          to_prev[v] = c.w.prev * adjoint[v];
          from_same[k][v] = c.w.mid * adjoint[v];
          to_next[v] = c.w.next * adjoint[v];
          if constexpr (kShared) {
            sum = {sum.prev + adjoint[v] * h_prev[v], sum.mid + adjoint[v] * h_mid[v],
                   sum.next + adjoint[v] * h_next[v]};
          } else {  // dL/dw_k = adjoint h_k
            const Taps<A> grad =
                normalize_backward(Taps<A>{h_prev[v], h_mid[v], h_next[v]}, c,
                                   complements(Taps<A>{e[0][v], e[1][v], e[2][v]}, adjoint[v]));
            grad_logits[0][v] = grad.prev, grad_logits[1][v] = grad.mid;
            grad_logits[2][v] = grad.next;
          }
        }
        State::set(states[k] + to_prev_of(line), plane_bytes, to_prev);
        State::set(states[k] + to_next_of(line), plane_bytes, to_next);
        if constexpr (kShared) {
          const int threads = plan.reduced_channels / V;
          sum = {sum_over_threads(sum.prev, threads), sum_over_threads(sum.mid, threads),
                 sum_over_threads(sum.next, threads)};
          if (t.partial_sums.data == nullptr)
            sum = normalize_backward(sum, c, complements(Taps<A>{e[0][0], e[1][0], e[2][0]}));
          grad_logits[0][0] = sum.prev, grad_logits[1][0] = sum.mid, grad_logits[2][0] = sum.next;
        }
        write_logits(item, line, next_grad_weight[k], grad_logits);
      } else {
        write_logits(item, line, next_grad_weight[k], {});
      }
      const int shift = tile.strip_length * pixel_bytes;
      if (exchanges && tile.has_left() && item.position == tile.core_begin)
        exchange.send(last - line, states[k] + to_prev_of(line) + shift, plane_bytes, to_prev, -1);
      if (exchanges && tile.has_right() && item.position == tile.core_end - 1)
        exchange.send(last - line, states[k] + to_next_of(line) - shift, plane_bytes, to_next, +1);

      auto d_gate = widen(copied<V>(slots[k] + stage + Ring::of(Ring::kX),
                                    x.at(line, item.position, item.channel)));
      auto d_input = widen(copied<V>(slots[k] + stage + Ring::of(Ring::kGate),
                                     gate.at(line, item.position, item.channel)));
#pragma unroll
      for (int v = 0; v < V; ++v) d_gate[v] *= adjoint[v], d_input[v] *= adjoint[v];
      store<T, V>(next_grad_gate[k], d_gate);
      store<T, V>(next_grad_input[k], d_input);
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      next_grad_gate[k] -= grad_gate.line_stride;
      next_grad_input[k] -= grad_input.line_stride;
      next_grad_weight[k] -= grad_weight.line_stride;
    }
    receives = !starts;
    wait_for_copies<kStages - 2>();
    stage = ring.after(stage);
    __syncthreads();
    if (exchanges) exchange.receive(last - line, threadIdx.x == 0);
  }
}

}  // namespace cgspn_seg
