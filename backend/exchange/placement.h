#pragma once

#include <span>
#include <string>
#include <vector>

namespace distro::exchange {

/// Where a rank runs: its host, and the accelerators of the host that its collective library may
/// use, under names that are unique on the host.
struct Placement {
  std::string host;
  std::vector<std::string> devices;
};

/// Whether all ranks can have an accelerator each, no two the same one.
[[nodiscard]] bool each_can_have_its_own(std::span<const Placement> ranks);

}  // namespace distro::exchange
