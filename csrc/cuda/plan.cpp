#include "plan.h"

#include <algorithm>

namespace cgspn_seg {
namespace {

// What was measured on an H200 (docs/kernel.md). Wide slices of the channels use memory best; where
// they leave multiprocessors without a block, narrow ones do better.
struct Tuning {
  int vector_bytes;  // a thread's channels
  int slice_bytes;   // a block's channels
  int items;         // threads a team is to have at most,
  bool nearest;      // or about
  int max_strips;    // more clusters of this size fit the GPU than of the largest
  int period, teams;
  int few_shared_period;  // where weights are shared and blocks too few all the same
};
// clang-format off
//                                 vector slice items nearest strips period       teams       few
constexpr Tuning kWideForward    = {  16,  128,  640,  false,     6, 1,           1,          kLongPeriod};
constexpr Tuning kNarrowForward  = {   8,   32,  152,  false,     6, kLongPeriod, kManyTeams, kLongPeriod};
constexpr Tuning kWideBackward   = {  16,  128,  240,   true,     5, 1,           1,          1};
constexpr Tuning kNarrowBackward = {   8,   32,  240,   true,     5, 1,           1,          1};
// clang-format on
constexpr int kMinStrip = 16;  // positions: below that, edges are too large a part

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int largest_divisor(int64_t n, int64_t limit) {
  for (int64_t d = std::min(n, limit); d > 1; --d)
    if (n % d == 0) return static_cast<int>(d);
  return 1;
}

class Planner {
 public:
  Planner(Pass pass, const Problem& p, const Layout& layout, const Device& device)
      : pass_(pass), p_(p), layout_(layout), device_(device) {
    shortest_ = INT32_MAX, longest_ = 0;
    for (int64_t d = 0; d < p.num_directions; ++d) {
      const int64_t positions = Walk(p, d).num_positions;
      shortest_ = std::min(shortest_, positions), longest_ = std::max(longest_, positions);
    }
  }

  std::optional<Plan> make() const {
    const bool forward = pass_ == Pass::kForward;
    const Tuning& wide = forward ? kWideForward : kWideBackward;
    const Tuning& narrow = forward ? kNarrowForward : kNarrowBackward;
    std::optional<Plan> plan = tuned(wide);
    if (!plan || plan->blocks < enough_blocks()) {
      const std::optional<Plan> other = tuned(narrow);
      if (other && (!plan || other->blocks > plan->blocks)) plan = other;
    }
    return plan ? plan : any();
  }

 private:
  int64_t enough_blocks() const { return device_.multiprocessors * int64_t{7} / 8; }
  bool has_shared_weights() const { return p_.group_size() > 1; }

  // The plan of a row of the table, if tensors are aligned for it.
  std::optional<Plan> tuned(const Tuning& t) const {
    const int channels = std::max(t.vector_bytes / layout_.element_bytes, 1);
    if (channels > layout_.aligned_channels || p_.channels % channels != 0 ||
        (has_shared_weights() && p_.group_size() % channels != 0)) {
      return std::nullopt;
    }
    Plan plan{channels};
    plan.lanes = largest_divisor(p_.channels / channels, t.slice_bytes / t.vector_bytes);
    plan.period = t.period, plan.teams = t.teams, plan.items_per_thread = 1;
    const int64_t items = longest_ * plan.lanes;
    const int64_t strips = t.nearest ? std::max<int64_t>((items + t.items / 2) / t.items, 1)
                                     : ceil_div(items, t.items);
    plan.strips = static_cast<int>(std::min<int64_t>(strips, kMaxStrips));
    const int max_strips = device_.has_clusters ? t.max_strips : 1;
    while (blocks(plan) < enough_blocks() && plan.strips < max_strips &&
           longest_ >= int64_t{kMinStrip} * (plan.strips + 1)) {
      ++plan.strips;
    }
    plan.strips = std::min(plan.strips, max_strips);
    // Where every multiprocessor has several blocks, they hide each other's waits.
    if (blocks(plan) > 2 * device_.multiprocessors) plan.period = plan.teams = 1;
    if (has_shared_weights() && blocks(plan) < enough_blocks()) plan.period = t.few_shared_period;
    if (const auto complete_plan = complete(plan)) return complete_plan;
    plan.period = plan.teams = 1;
    return complete(plan);
  }

  // The first plan that fits: more blocks a line, fewer channels a block, more positions a thread.
  std::optional<Plan> any() const {
    const int widest = 16 / layout_.element_bytes;
    const bool aligned = layout_.aligned_channels >= widest && p_.channels % widest == 0 &&
                         (!has_shared_weights() || p_.group_size() % widest == 0);
    const int most_strips = device_.has_clusters ? kMaxStrips : 1;
    for (const int channels : {aligned ? widest : 1, 1}) {
      for (const int items : {1, kManyItems}) {
        if (items > 1 && channels > 1) continue;
        for (int lanes = 8; lanes >= 1; lanes /= 2) {
          for (int strips = 1; strips <= most_strips; ++strips) {
            Plan plan{channels};
            plan.lanes = largest_divisor(p_.channels / channels, lanes);
            plan.strips = strips, plan.items_per_thread = items, plan.period = plan.teams = 1;
            if (const auto complete_plan = complete(plan)) return complete_plan;
          }
        }
      }
    }
    return std::nullopt;
  }

  int64_t blocks(const Plan& plan) const {
    const int64_t slices = p_.channels / (int64_t{plan.lanes} * plan.channels_per_thread);
    return plan.strips * slices * p_.num_directions * p_.batch;
  }

  // Fills in what follows from the choices; nothing if they do not fit the device.
  std::optional<Plan> complete(Plan plan) const {
    const bool forward = pass_ == Pass::kForward;
    // A strip gives its neighbours as many edge positions as there are lines in a period.
    if (plan.strips > 1 && ceil_div(shortest_, plan.strips) < plan.period) return std::nullopt;
    const int halo = plan.strips == 1 ? 0 : forward ? plan.period - 1 : 1;
    const int64_t columns = ceil_div(longest_, plan.strips) + 2 * halo;
    const int64_t threads =
        ceil_div(ceil_div(columns * plan.lanes, plan.items_per_thread), 32) * 32;
    if (threads * plan.teams > max_threads(pass_)) return std::nullopt;
    plan.columns = static_cast<int>(columns);
    plan.threads = static_cast<int>(threads);
    plan.blocks = blocks(plan);
    const int ring =
        item_bytes(pass_, layout_.element_bytes, plan.channels_per_thread, has_shared_weights());
    const int lines = forward ? state_lines(plan.period) : 4;
    plan.shared_bytes =
        threads * plan.items_per_thread * plan.teams * kStages * plan.period * ring +
        (columns + 2) * plan.lanes * plan.channels_per_thread * lines * layout_.accumulator_bytes +
        kExchangeBytes + (forward ? kTeamBarrierBytes : 0);
    if (plan.shared_bytes > device_.shared_bytes_per_block || plan.blocks > INT32_MAX)
      return std::nullopt;
    plan.reduced_channels = 1;
    if (has_shared_weights()) {
      plan.reduced_channels = plan.channels_per_thread;
      for (int added = 2; added <= plan.lanes; added *= 2) {
        const int channels = added * plan.channels_per_thread;
        if (p_.group_size() % channels == 0 && plan.lanes % added == 0)
          plan.reduced_channels = channels;
      }
    }
    return plan;
  }

  Pass pass_;
  Problem p_;
  Layout layout_;
  Device device_;
  int64_t shortest_, longest_;  // lines of the directions to scan
};

}  // namespace

std::optional<Plan> make_plan(Pass pass, const Problem& p, const Layout& layout,
                              const Device& device) {
  return Planner(pass, p, layout, device).make();
}

}  // namespace cgspn_seg
