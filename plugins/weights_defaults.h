#pragma once

#include <cstddef>
#include <cstdint>

/// What the `weights` mode does where the script does not say; the same on all ranks.
namespace distro::plugins {

/// How many turns weights take by default: the more, the less is looked at in an exchange and the
/// fewer bits an index costs. Of what is looked at, a sixteenth is sent at most, so that a
/// selection remains one.
[[nodiscard]] std::size_t default_turns(std::uint32_t k) noexcept;

/// Over how many steps comes what a gain adds to a mean of moves by default (Spread; 0: at once).
/// The more of a tile is sent at each step, the sooner all participants send the same entry, and
/// the longer it takes until each has seen what the others' entries did.
/// integration/studies/grids/spread.json compares.
[[nodiscard]] std::uint32_t default_spread_steps(std::uint32_t k, int delay) noexcept;

/// What a participant's unsent moves count in its own weights by default, of 1. `sent`: what they
/// count when they have been sent, gain * weight of the participant. That is the answer where few
/// entries are sent at a time: then sending changes nothing for the sender. Where a gain is spread
/// it is 1, for then the mean counts in full at once. Without a gain, but with k above 64, it is at
/// least 1/2: ranks that hardly see their own moves go on in a direction until these come back to
/// them from all, and where many are sent that is too far. integration/studies/grids/share.json
/// compares.
[[nodiscard]] float default_share(float sent, float gain, std::uint32_t k,
                                  std::uint32_t spread_steps) noexcept;

}  // namespace distro::plugins
