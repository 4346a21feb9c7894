// What makes the CPU scan vectorize and stream: an exponential, loops over channels, lines,
// prefetching.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace cgspn_seg {

// exp(x) for |x| <= kMaxLogit, within 2 ulp: Taylor's series on [-ln(2)/2, ln(2)/2] and a shift of
// the exponent. Unlike std::exp it vectorizes in a loop without -ffast-math.
inline float exp_in_range(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float shifted = x * 1.44269504089f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float poly = 1.0f / 5040.0f;
  poly = poly * r + 1.0f / 720.0f;
  poly = poly * r + 1.0f / 120.0f;
  poly = poly * r + 1.0f / 24.0f;
  poly = poly * r + 1.0f / 6.0f;
  poly = poly * r + 0.5f;
  poly = poly * r + 1.0f;
  poly = poly * r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127) << 23;  // the low bits of `shifted` hold n
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return poly * scale;
}

inline double exp_in_range(double x) { return std::exp(x); }

// The channels one task works on; they hold whole groups.
struct Slice {
  int64_t first_group, num_groups, group_size;

  int64_t first_channel() const { return first_group * group_size; }
  int64_t num_channels() const { return num_groups * group_size; }

  // Calls `body(group, channel)` for all channels, in loops that vectorize.
  template <typename Body>
  void for_each_channel(const Body& body) const {
    if (group_size == 1) {
#pragma omp simd
      for (int64_t c = 0; c < num_groups; ++c) body(c, c);
      return;
    }
    for (int64_t g = 0; g < num_groups; ++g) {
#pragma omp simd
      for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) body(g, c);
    }
  }
};

// One line of `num_positions` pixels with an empty pixel on either side, so that every pixel has
// three neighbours.
template <typename A>
class Line {
 public:
  Line(int64_t num_positions, int64_t values_per_position)
      : values_per_position_(values_per_position),
        values_((num_positions + 2) * values_per_position) {}
  A* at(int64_t position) { return values_.data() + (position + 1) * values_per_position_; }

 private:
  int64_t values_per_position_;
  std::vector<A> values_;
};

// Asks for the cache lines of `count` values. Successive pixels of a direction lie too far apart,
// on other pages as a rule, for the processor to see the pattern by itself.
//
// Always inlined: GCC takes a function that only prefetches for one without effect, and drops
// calls.
template <typename T>
[[gnu::always_inline]] inline void prefetch(T* values, int64_t count) {
  constexpr int64_t kValuesPerLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kValuesPerLine)
    __builtin_prefetch(values + i, std::is_const_v<T> ? 0 : 1);
}

}  // namespace cgspn_seg
