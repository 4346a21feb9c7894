// make_plan for Python's ctypes: what test_plan.py compiles.
#include "../../csrc/cuda/plan.h"

using namespace cgspn_seg;

// Fills in `plan`, and says whether there is one.
extern "C" int plan_for_tests(int backward, const int64_t* grid, int64_t groups,
                              const int64_t* directions, int64_t num_directions, int element_bytes,
                              int aligned_channels, int multiprocessors, int64_t shared_bytes,
                              int has_clusters, int64_t* plan) {
  Problem p{};
  p.batch = grid[0], p.height = grid[1], p.width = grid[2], p.channels = grid[3];
  p.groups = groups, p.num_directions = num_directions, p.segment_length = 1;
  for (int64_t d = 0; d < num_directions; ++d)
    p.directions[d] = static_cast<Direction>(directions[d]);
  const Layout layout{element_bytes, element_bytes == 8 ? 8 : 4, aligned_channels};
  const Device device{multiprocessors, shared_bytes, has_clusters != 0};
  const auto made = make_plan(backward ? Pass::kBackward : Pass::kForward, p, layout, device);
  if (!made) return 0;
  const int64_t fields[] = {
      made->channels_per_thread, made->lanes,   made->strips,  made->period,           made->teams,
      made->items_per_thread,    made->columns, made->threads, made->reduced_channels, made->blocks,
      made->shared_bytes};
  for (int i = 0; i < 11; ++i) plan[i] = fields[i];
  return 1;
}
