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

#ifdef __CUDACC__
#define CGSPN_INLINE __host__ __device__ __forceinline__
#else
#define CGSPN_INLINE inline
#endif

namespace cgspn_seg {

constexpr int kMaxDirections = 4;

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

// The Stability-Context Condition. With σ_k the sigmoid of a pixel's logit for neighbour k, or 0
// where that neighbour lies outside the image, w_k = σ_k * inverse_sum(σ_-1, σ_0, σ_+1). The sum is
// kept away from zero as in the original implementation; below the bound the weights sum to less
// than one.
constexpr double kMinSum = 1e-7;

template <typename T>
CGSPN_INLINE T inverse_sum(T sigma_prev, T sigma_mid, T sigma_next) {
  const T sum = sigma_prev + sigma_mid + sigma_next;
  return T(1) / (sum > T(kMinSum) ? sum : T(kMinSum));
}

// Derivative: dL/dlogit_k = (dL/dw_k - mean) * inverse * σ_k * (1 - σ_k), where the mean of the
// dL/dw, weighted by w, comes from the sum, which has no derivative where it is bounded.
template <typename T>
CGSPN_INLINE T weighted_mean(T d_prev, T w_prev, T d_mid, T w_mid, T d_next, T w_next, T inverse) {
  const T mean = d_prev * w_prev + d_mid * w_mid + d_next * w_next;
  return inverse < T(1) / T(kMinSum) ? mean : T(0);
}

template <typename T>
CGSPN_INLINE T logit_gradient(T d_weight, T mean, T inverse, T sigma) {
  return (d_weight - mean) * inverse * sigma * (T(1) - sigma);
}

}  // namespace cgspn_seg
