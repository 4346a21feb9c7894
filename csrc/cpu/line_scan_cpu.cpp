// The line scan on the CPU, forward and backward.
//
// A task scans one direction of one image for a slice of channels, line after line; tasks run in
// parallel and the loops over channels vectorize. State, coefficients and their gradients are kept
// in the accumulation type: double for float64, float for everything else.
#include <ATen/Parallel.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../line_scan_op.h"
#include "vectorized.h"

namespace cgspn_seg {
namespace {

constexpr int64_t kPrefetchDistance = 2;  // pixels

// Normalizes the logits of one pixel. `w` receives three rows of one value per group; `derivative`,
// if given, four: the complements of the sigmoids, and whether the sum is free.
template <typename T, typename A>
void normalize_pixel(const T* logits, int64_t tap_stride, bool has_prev, bool has_next, int64_t n,
                     A* w, A* derivative) {
  // In a function of their own the structs stay in vector registers.
  const auto normalize_group = [=](int64_t g) {
    const auto exponential = [](T logit) {
      return exp_in_range(-clamp_logit(static_cast<A>(logit)));
    };
    const Taps<A> e{exponential(logits[g]), exponential(logits[tap_stride + g]),
                    exponential(logits[2 * tap_stride + g])};
    const Coefficients<A> c = normalize(e, A(has_prev), A(has_next));
    w[g] = c.w.prev;
    w[n + g] = c.w.mid;
    w[2 * n + g] = c.w.next;
    if (derivative != nullptr) {
      const Taps<A> complement = complements(e);
      derivative[g] = complement.prev;
      derivative[n + g] = complement.mid;
      derivative[2 * n + g] = complement.next;
      derivative[3 * n + g] = c.sum_is_free;
    }
  };
#pragma omp simd
  for (int64_t g = 0; g < n; ++g) normalize_group(g);
}

// Turns the gradient of w into that of the logits; rows as in normalize_pixel.
template <typename T, typename A>
void normalize_pixel_backward(const A* w, const A* derivative, const A* d_w, int64_t n, T* d_logits,
                              int64_t tap_stride) {
  const auto normalize_group_backward = [=](int64_t g) {
    const Coefficients<A> c{{w[g], w[n + g], w[2 * n + g]}, derivative[3 * n + g]};
    const Taps<A> gradient =
        normalize_backward<A>({d_w[g], d_w[n + g], d_w[2 * n + g]}, c,
                              {derivative[g], derivative[n + g], derivative[2 * n + g]});
    d_logits[g] = static_cast<T>(gradient.prev);
    d_logits[tap_stride + g] = static_cast<T>(gradient.mid);
    d_logits[2 * tap_stride + g] = static_cast<T>(gradient.next);
  };
#pragma omp simd
  for (int64_t g = 0; g < n; ++g) normalize_group_backward(g);
}

template <typename T>
struct ForwardTensors {
  Pixels<const T> x, weight, gate;
  Pixels<T> h;

  [[gnu::always_inline]] inline void prefetch_pixel(int64_t b, int64_t row, int64_t col, int64_t d,
                                                    const Slice& s) const {
    prefetch(gate.at(b, row, col, d) + s.first_channel(), s.num_channels());
    prefetch(h.at(b, row, col, d) + s.first_channel(), s.num_channels());
    for (int tap = 0; tap < 3; ++tap) {
      prefetch(weight.at(b, row, col, d) + s.first_group + tap * weight.tap_stride, s.num_groups);
    }
  }
};

template <typename T>
struct BackwardTensors {
  Pixels<const T> x, weight, grad_h, h;
  Pixels<T> grad_weight;
  Pixels<Accumulator<T>> adjoint;  // dL/dh including everything later in the scan

  [[gnu::always_inline]] inline void prefetch_pixel(int64_t b, int64_t row, int64_t col, int64_t d,
                                                    const Slice& s) const {
    prefetch(grad_h.at(b, row, col, d) + s.first_channel(), s.num_channels());
    prefetch(adjoint.at(b, row, col, d) + s.first_channel(), s.num_channels());
    for (int tap = 0; tap < 3; ++tap) {
      prefetch(weight.at(b, row, col, d) + s.first_group + tap * weight.tap_stride, s.num_groups);
      prefetch(grad_weight.at(b, row, col, d) + s.first_group + tap * grad_weight.tap_stride,
               s.num_groups);
    }
  }
};

template <typename T>
void scan_forward(const Problem& p, const ForwardTensors<T>& t, int64_t b, int64_t d,
                  const Slice& s) {
  using A = Accumulator<T>;
  const Walk walk(p, d);
  const int64_t n = s.num_groups, c0 = s.first_channel();
  Line<A> state(walk.num_positions, s.num_channels()),
      previous(walk.num_positions, s.num_channels());
  std::vector<A> coefficients(3 * n);
  const A* const w = coefficients.data();
  for (int64_t line = 0; line < walk.num_lines; ++line) {
    std::swap(state, previous);
    const bool starts = walk.starts_segment(line);
    for (int64_t j = 0; j < walk.num_positions; ++j) {
      const int64_t row = walk.row(line, j), col = walk.col(line, j);
      const T* const x = t.x.at(b, row, col) + c0;
      const T* const gate = t.gate.at(b, row, col, d) + c0;
      T* const h = t.h.at(b, row, col, d) + c0;
      A* const out = state.at(j);
      if (const int64_t ahead = j + kPrefetchDistance; ahead < walk.num_positions) {
        t.prefetch_pixel(b, walk.row(line, ahead), walk.col(line, ahead), d, s);
      }
      if (starts) {
        s.for_each_channel([=](int64_t, int64_t c) {
          out[c] = static_cast<A>(gate[c]) * static_cast<A>(x[c]);
          h[c] = static_cast<T>(out[c]);
        });
        continue;
      }
      normalize_pixel<T, A>(t.weight.at(b, row, col, d) + s.first_group, t.weight.tap_stride, j > 0,
                            j + 1 < walk.num_positions, n, coefficients.data(), nullptr);
      const A* const h_prev = previous.at(j - 1);
      const A* const h_mid = previous.at(j);
      const A* const h_next = previous.at(j + 1);
      s.for_each_channel([=](int64_t g, int64_t c) {
        out[c] = w[g] * h_prev[c] + w[n + g] * h_mid[c] + w[2 * n + g] * h_next[c] +
                 static_cast<A>(gate[c]) * static_cast<A>(x[c]);
        h[c] = static_cast<T>(out[c]);
      });
    }
  }
}

// The gradient of w at one pixel: the adjoint times the state of each neighbour, summed over the
// channels of a group.
template <typename T, typename A>
void coefficient_gradient(const Slice& s, const A* adjoint, const T* h_prev, const T* h_mid,
                          const T* h_next, A* d_w) {
  const int64_t n = s.num_groups;
  if (s.group_size == 1) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      d_w[c] = adjoint[c] * static_cast<A>(h_prev[c]);
      d_w[n + c] = adjoint[c] * static_cast<A>(h_mid[c]);
      d_w[2 * n + c] = adjoint[c] * static_cast<A>(h_next[c]);
    }
    return;
  }
  for (int64_t g = 0; g < n; ++g) {
    A prev = 0, mid = 0, next = 0;
#pragma omp simd reduction(+ : prev, mid, next)
    for (int64_t c = g * s.group_size; c < (g + 1) * s.group_size; ++c) {
      prev += adjoint[c] * static_cast<A>(h_prev[c]);
      mid += adjoint[c] * static_cast<A>(h_mid[c]);
      next += adjoint[c] * static_cast<A>(h_next[c]);
    }
    d_w[g] = prev;
    d_w[n + g] = mid;
    d_w[2 * n + g] = next;
  }
}

// Visits the lines in the opposite order. A pixel's adjoint is its own gradient plus the adjoints
// of the three pixels of the line after it that read from it, times their coefficients.
template <typename T>
void scan_backward(const Problem& p, const BackwardTensors<T>& t, int64_t b, int64_t d,
                   const Slice& s) {
  using A = Accumulator<T>;
  const Walk walk(p, d);
  const int64_t n = s.num_groups, c0 = s.first_channel();
  Line<A> adjoints(walk.num_positions, s.num_channels()),
      later_adjoints(walk.num_positions, s.num_channels());
  Line<A> coefficients(walk.num_positions, 3 * n), later_coefficients(walk.num_positions, 3 * n);
  std::vector<A> derivative(4 * n), d_w(3 * n);
  const auto h_before = [&](int64_t line, int64_t position) {
    return t.h.at(b, walk.row(line - 1, position), walk.col(line - 1, position), d) + c0;
  };
  for (int64_t line = walk.num_lines - 1; line >= 0; --line) {
    std::swap(adjoints, later_adjoints);
    std::swap(coefficients, later_coefficients);
    const bool starts = walk.starts_segment(line);
    const bool is_read = line + 1 < walk.num_lines && !walk.starts_segment(line + 1);
    for (int64_t j = 0; j < walk.num_positions; ++j) {
      const int64_t row = walk.row(line, j), col = walk.col(line, j);
      const T* const grad_h = t.grad_h.at(b, row, col, d) + c0;
      A* const adjoint = adjoints.at(j);
      A* const stored = t.adjoint.at(b, row, col, d) + c0;
      if (const int64_t ahead = j + kPrefetchDistance; ahead < walk.num_positions) {
        t.prefetch_pixel(b, walk.row(line, ahead), walk.col(line, ahead), d, s);
        if (!starts) prefetch(h_before(line, ahead), s.num_channels());
      }
      if (is_read) {
        // The pixel is the neighbour at +1 of position j - 1, and at -1 of position j + 1.
        const A* const g_prev = later_adjoints.at(j - 1);
        const A* const g_mid = later_adjoints.at(j);
        const A* const g_next = later_adjoints.at(j + 1);
        const A* const w_prev = later_coefficients.at(j - 1) + 2 * n;
        const A* const w_mid = later_coefficients.at(j) + n;
        const A* const w_next = later_coefficients.at(j + 1);
        s.for_each_channel([=](int64_t g, int64_t c) {
          adjoint[c] = static_cast<A>(grad_h[c]) + w_prev[g] * g_prev[c] + w_mid[g] * g_mid[c] +
                       w_next[g] * g_next[c];
          stored[c] = adjoint[c];
        });
      } else {
        s.for_each_channel(
            [=](int64_t, int64_t c) { stored[c] = adjoint[c] = static_cast<A>(grad_h[c]); });
      }
      T* const grad_weight = t.grad_weight.at(b, row, col, d) + s.first_group;
      if (starts) {
        for (int tap = 0; tap < 3; ++tap)
          std::fill_n(grad_weight + tap * t.grad_weight.tap_stride, n, T(0));
        continue;
      }
      const bool has_prev = j > 0, has_next = j + 1 < walk.num_positions;
      const T* const h_mid = h_before(line, j);
      // Outside the image w is 0, and with it the gradient of the logit: any finite state will do.
      const T* const h_prev = has_prev ? h_before(line, j - 1) : h_mid;
      const T* const h_next = has_next ? h_before(line, j + 1) : h_mid;
      A* const w = coefficients.at(j);
      normalize_pixel<T, A>(t.weight.at(b, row, col, d) + s.first_group, t.weight.tap_stride,
                            has_prev, has_next, n, w, derivative.data());
      coefficient_gradient<T, A>(s, adjoint, h_prev, h_mid, h_next, d_w.data());
      normalize_pixel_backward<T, A>(w, derivative.data(), d_w.data(), n, grad_weight,
                                     t.grad_weight.tap_stride);
    }
  }
}

// Both factors of λ ⊙ x from the adjoint. `grad_gate` may be the adjoint's own memory.
template <typename T>
void input_gradients(const Problem& p, const Pixels<const T>& x, const Pixels<const T>& gate,
                     const Pixels<Accumulator<T>>& adjoint, const Pixels<T>& grad_x,
                     const Pixels<T>& grad_gate) {
  using A = Accumulator<T>;
  at::parallel_for(0, p.batch * p.height, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> sum(p.channels);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / p.height, row = index % p.height;
      for (int64_t col = 0; col < p.width; ++col) {
        std::fill(sum.begin(), sum.end(), A(0));
        const T* const value = x.at(b, row, col);
        for (int64_t d = 0; d < p.num_directions; ++d) {
          const A* const g = adjoint.at(b, row, col, d);
          const T* const lambda = gate.at(b, row, col, d);
          T* const d_gate = grad_gate.at(b, row, col, d);
#pragma omp simd
          for (int64_t c = 0; c < p.channels; ++c) {
            sum[c] += static_cast<A>(lambda[c]) * g[c];
            d_gate[c] = static_cast<T>(static_cast<A>(value[c]) * g[c]);
          }
        }
        std::transform(sum.begin(), sum.end(), grad_x.at(b, row, col),
                       [](A v) { return static_cast<T>(v); });
      }
    }
  });
}

// Runs `scan(b, d, slice)` for every image, direction and slice. Channels are divided only where
// images and directions alone do not occupy the threads, at group borders, into slices wide enough
// for the vector units.
template <typename Scan>
void for_each_scan(const Problem& p, const Scan& scan) {
  constexpr int64_t kMinSliceChannels = 16;
  const int64_t scans = p.batch * p.num_directions;
  const int64_t wanted = at::divup(2 * at::get_num_threads(), std::max<int64_t>(scans, 1));
  const int64_t largest =
      std::max<int64_t>(1, p.channels / std::max(kMinSliceChannels, p.group_size()));
  const int64_t slices = std::clamp<int64_t>(wanted, 1, largest);
  const int64_t groups_per_slice = at::divup(p.groups, slices);
  at::parallel_for(0, scans * slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_group = (task % slices) * groups_per_slice;
      const int64_t num_groups = std::min(groups_per_slice, p.groups - first_group);
      if (num_groups <= 0) continue;
      const int64_t image_and_direction = task / slices;
      scan(image_and_direction / p.num_directions, image_and_direction % p.num_directions,
           Slice{first_group, num_groups, p.group_size()});
    }
  });
}

// An uninitialized result. Large ones ask for huge pages: at 4 KiB a page, the faults of the first
// touch take longer than the scan that fills them.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::Tensor result = at::empty(sizes, options);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1),
                  last = (begin + result.nbytes()) & ~(kHugePage - 1);
  // Only a hint: where the kernel declines it, nothing is lost.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return result;
}

at::Tensor line_scan_cpu(const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& input_gate, at::IntArrayRef directions,
                         std::optional<int64_t> segment_length) {
  const Problem p = check_arguments(x, weight, input_gate, directions, segment_length);
  const at::Tensor h = empty_result(input_gate.sizes(), x.options());
  if (h.numel() == 0) return h;
  const at::Tensor dense_x = with_dense_channels(x), dense_weight = with_dense_channels(weight),
                   dense_gate = with_dense_channels(input_gate);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "line_scan", [&] {
    const ForwardTensors<scalar_t> tensors{pixels<const scalar_t>(dense_x),
                                           pixels<const scalar_t>(dense_weight),
                                           pixels<const scalar_t>(dense_gate), pixels<scalar_t>(h)};
    for_each_scan(p, [&](int64_t b, int64_t d, const Slice& s) {
      scan_forward<scalar_t>(p, tensors, b, d, s);
    });
  });
  return h;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> line_scan_backward_cpu(
    const at::Tensor& grad_h, const at::Tensor& x, const at::Tensor& weight,
    const at::Tensor& input_gate, const at::Tensor& h, at::IntArrayRef directions,
    std::optional<int64_t> segment_length) {
  const Problem p =
      check_backward_arguments(grad_h, x, weight, input_gate, h, directions, segment_length);
  const at::Tensor grad_x = empty_result(x.sizes(), x.options());
  const at::Tensor grad_weight = empty_result(weight.sizes(), x.options());
  const at::Tensor grad_gate = empty_result(input_gate.sizes(), x.options());
  if (grad_gate.numel() == 0) return {grad_x.zero_(), grad_weight.zero_(), grad_gate};
  const at::Tensor dense_x = with_dense_channels(x), dense_weight = with_dense_channels(weight),
                   dense_gate = with_dense_channels(input_gate),
                   dense_grad_h = with_dense_channels(grad_h), dense_h = with_dense_channels(h);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "line_scan_backward", [&] {
        using A = Accumulator<scalar_t>;
        const bool half = !std::is_same_v<A, scalar_t>;
        const at::Tensor adjoint =
            half ? empty_result(grad_gate.sizes(), x.options().dtype(at::kFloat)) : grad_gate;
        const BackwardTensors<scalar_t> tensors{
            pixels<const scalar_t>(dense_x),      pixels<const scalar_t>(dense_weight),
            pixels<const scalar_t>(dense_grad_h), pixels<const scalar_t>(dense_h),
            pixels<scalar_t>(grad_weight),        pixels<A>(adjoint)};
        for_each_scan(p, [&](int64_t b, int64_t d, const Slice& s) {
          scan_backward<scalar_t>(p, tensors, b, d, s);
        });
        input_gradients<scalar_t>(p, tensors.x, pixels<const scalar_t>(dense_gate), tensors.adjoint,
                                  pixels<scalar_t>(grad_x), pixels<scalar_t>(grad_gate));
      });
  return {grad_x, grad_weight, grad_gate};
}

TORCH_LIBRARY_IMPL(cgspn_seg, CPU, m) {
  m.impl("line_scan", &line_scan_cpu);
  m.impl("line_scan_backward", &line_scan_backward_cpu);
}

}  // namespace
}  // namespace cgspn_seg
