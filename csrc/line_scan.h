// What the CPU and the CUDA kernels of the line scan share: the walk of a direction over the image,
// tensor addressing, and the Stability-Context normalization with its derivative. No PyTorch header
// is needed here, so that device code compiles with nvcc alone.
//
// Notation (GSPN, section 3): for line i, position j along the line and channel c,
//
//     h[i][j] = w[i][j][0] * h[i-1][j-1] + w[i][j][1] * h[i-1][j] + w[i][j][2] * h[i-1][j+1]
//               + gate[i][j] * x[i][j]
//
// where w are the sigmoids of three logits divided by their sum over the neighbours that lie in the
// image.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define CGSPN_INLINE __host__ __device__ __forceinline__
#else
#define CGSPN_INLINE inline
#endif

namespace cgspn_seg {

constexpr int kMaxDirections = 4;

// State, coefficients and their gradients: double for float64, float for everything else.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The order is part of the operator's schema (`int[] directions`) and of cgspn_seg.ops.DIRECTIONS.
enum class Direction : int64_t { kDown = 0, kUp = 1, kRight = 2, kLeft = 3 };

struct Problem {
  int64_t batch, height, width, channels, groups;
  int64_t num_directions;
  Direction directions[kMaxDirections];
  int64_t segment_length;  // lines after which the state restarts, at least 1

  CGSPN_INLINE int64_t group_size() const { return channels / groups; }
};

// How one direction visits the image: lines 0, 1, ... in scan order, each of `num_positions`
// pixels.
struct Walk {
  bool lines_are_rows;
  bool reversed;  // the first line visited is the bottom row or the right column
  int64_t num_lines, num_positions;
  int64_t segment_length;

  CGSPN_INLINE Walk(const Problem& p, int64_t d)
      : lines_are_rows(p.directions[d] == Direction::kDown || p.directions[d] == Direction::kUp),
        reversed(p.directions[d] == Direction::kUp || p.directions[d] == Direction::kLeft),
        num_lines(lines_are_rows ? p.height : p.width),
        num_positions(lines_are_rows ? p.width : p.height),
        segment_length(p.segment_length) {}

  CGSPN_INLINE bool starts_segment(int64_t line) const { return line % segment_length == 0; }
  CGSPN_INLINE int64_t row(int64_t line, int64_t position) const {
    return lines_are_rows ? image_line(line) : position;
  }
  CGSPN_INLINE int64_t col(int64_t line, int64_t position) const {
    return lines_are_rows ? position : image_line(line);
  }
  // The inverse of row and col.
  CGSPN_INLINE int64_t line(int64_t row, int64_t col) const {
    return image_line(lines_are_rows ? row : col);
  }
  CGSPN_INLINE int64_t position(int64_t row, int64_t col) const {
    return lines_are_rows ? col : row;
  }

 private:
  CGSPN_INLINE int64_t image_line(int64_t line) const {
    return reversed ? num_lines - 1 - line : line;
  }
};

// A (B, H, W, C), (B, H, W, D, C) or (B, H, W, D, 3, G) tensor whose last axis is dense. Strides
// count elements.
template <typename T>
struct Pixels {
  T* data;
  int64_t batch_stride, row_stride, col_stride;
  int64_t direction_stride;  // 0 for tensors without a direction axis
  int64_t tap_stride;        // 0 for tensors without an axis of three taps

  CGSPN_INLINE T* at(int64_t b, int64_t row, int64_t col, int64_t d = 0) const {
    return data + b * batch_stride + row * row_stride + col * col_stride + d * direction_stride;
  }
};

// One value for each of the neighbours at -1, 0 and +1.
template <typename T>
struct Taps {
  T prev, mid, next;
};

// The Stability-Context Condition: w_k = σ_k / Σσ over the neighbours inside the image. The sum is
// kept away from zero as in the original implementation; below the bound the w sum to less than
// one.
constexpr double kMinSum = 1e-7;

// Logits are clamped to ±kMaxLogit: far beyond the bound on the sum, yet no product of three
// exponentials overflows.
template <typename T>
constexpr T kMaxLogit = sizeof(T) > 4 ? T(200) : T(28);

// A NaN passes.
template <typename T>
CGSPN_INLINE T clamp_logit(T logit) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, float>) {
    // One instruction. Above the upper bound, exp(-logit) vanishes beside 1 with a clamp or
    // without.
    float x;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(logit), "f"(-kMaxLogit<float>));
    return x;
  }
#endif
  const T x = logit < -kMaxLogit<T> ? -kMaxLogit<T> : logit;
  return x > kMaxLogit<T> ? kMaxLogit<T> : x;
}

// 1 / x; to one unit in the last place on a GPU, where the exact quotient takes ten instructions.
template <typename T>
CGSPN_INLINE T reciprocal(T x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, float>) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }
#endif
  return T(1) / x;
}

template <typename T>
CGSPN_INLINE T larger(T a, T b) {
#ifdef __CUDA_ARCH__
  return fmax(a, b);
#else
  return a > b ? a : b;
#endif
}

// The w before and after the division.
template <typename T>
struct Shares {
  Taps<T> share;  // w_k = share_k * inverse
  T inverse;
  T sum_is_free;  // 1, or 0 where the bound on the sum holds
};

template <typename T>
struct Coefficients {
  Taps<T> w;
  T sum_is_free;
};

// With e_k = exp(-logit_k), σ_k = 1 / (1 + e_k). Numerators and denominator of the w are multiplied
// by all three (1 + e_k), which leaves one division. `has_prev` and `has_next` are 1, or 0 where
// that neighbour lies outside the image.
template <typename T>
CGSPN_INLINE Shares<T> shares(Taps<T> e, T has_prev, T has_next) {
  const T d_prev = T(1) + e.prev, d_mid = T(1) + e.mid, d_next = T(1) + e.next;
  const T prev = has_prev * (d_mid * d_next);
  const T mid = d_prev * d_next;
  const T next = has_next * (d_prev * d_mid);
  const T sum = prev + mid + next;
  const T bound = T(kMinSum) * (mid * d_mid);
  return {{prev, mid, next}, reciprocal(larger(sum, bound)), sum > bound ? T(1) : T(0)};
}

template <typename T>
CGSPN_INLINE Coefficients<T> normalize(Taps<T> e, T has_prev, T has_next) {
  const Shares<T> s = shares(e, has_prev, has_next);
  return {{s.share.prev * s.inverse, s.share.mid * s.inverse, s.share.next * s.inverse},
          s.sum_is_free};
}

// 1 - σ_k = e_k / (1 + e_k), again with one division; all times `scale`.
template <typename T>
CGSPN_INLINE Taps<T> complements(Taps<T> e, T scale = T(1)) {
  const T d_prev = T(1) + e.prev, d_mid = T(1) + e.mid, d_next = T(1) + e.next;
  const T inverse = scale * reciprocal(d_prev * d_mid * d_next);
  return {e.prev * (d_mid * d_next) * inverse, e.mid * (d_prev * d_next) * inverse,
          e.next * (d_prev * d_mid) * inverse};
}

// dL/dlogit_k = (dL/dw_k - mean) w_k (1 - σ_k). The mean of the dL/dw, weighted by w, comes from
// the sum, which has no derivative where its bound holds.
template <typename T>
CGSPN_INLINE Taps<T> normalize_backward(Taps<T> d_w, Coefficients<T> c, Taps<T> complement) {
  const Taps<T> w = c.w;
  const T mean = c.sum_is_free * (d_w.prev * w.prev + d_w.mid * w.mid + d_w.next * w.next);
  return {(d_w.prev - mean) * w.prev * complement.prev, (d_w.mid - mean) * w.mid * complement.mid,
          (d_w.next - mean) * w.next * complement.next};
}

}  // namespace cgspn_seg
