#include "plugins/weights_defaults.h"

#include <algorithm>

#include "kernels/kernels.h"

namespace distro::plugins {

std::size_t default_turns(std::uint32_t k) noexcept {
  constexpr std::size_t kMost = 16;
  constexpr std::size_t kMostKept = kernels::kTileElements / 16;
  std::size_t turns = 1;
  while (turns < kMost && 2 * turns * k <= kMostKept) {
    turns *= 2;
  }
  return turns;
}

std::uint32_t default_spread_steps(std::uint32_t k, int delay) noexcept {
  // Fewer: an entry is sent so seldom that the participants' parts come one by one as it is.
  constexpr std::uint32_t kLeastK = 24;
  constexpr std::uint32_t kMostSteps = 48;
  // With everything sent and waited for, every step begins where all ranks are.
  const bool seen_at_once = k == kernels::kTileElements && delay == 0;
  return k < kLeastK || seen_at_once ? 0 : std::min(3 * k / 8, kMostSteps);
}

float default_share(float sent, float gain, std::uint32_t k, std::uint32_t spread_steps) noexcept {
  constexpr float kLeastOfMany = 0.5F;
  constexpr std::uint32_t kFew = 64;
  if (gain > 1.0F) {
    return spread_steps > 0 ? 1.0F : sent;
  }
  return k > kFew ? std::max(sent, kLeastOfMany) : sent;
}

}  // namespace distro::plugins
