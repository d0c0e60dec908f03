#include "backend/exchange/placement.h"

#include <cstddef>
#include <map>
#include <set>
#include <utility>

namespace distro::exchange {
namespace {

using Device = std::pair<std::string, std::string>;  // host, name

// Kuhn's matching of ranks to devices.
class Matching {
 public:
  explicit Matching(std::span<const Placement> ranks) : ranks_(ranks) {}

  // Find the rank a device, moving others to devices of their choice where that is needed.
  bool place(std::size_t rank) {
    std::set<Device> tried;
    return place(rank, tried);
  }

 private:
  bool place(std::size_t rank, std::set<Device>& tried) {
    for (const auto& name : ranks_[rank].devices) {
      const Device device{ranks_[rank].host, name};
      if (!tried.insert(device).second) {
        continue;
      }
      const auto owner = owners_.find(device);
      if (owner == owners_.end() || place(owner->second, tried)) {
        owners_[device] = rank;
        return true;
      }
    }
    return false;
  }

  std::span<const Placement> ranks_;
  std::map<Device, std::size_t> owners_;
};

}  // namespace

bool each_can_have_its_own(std::span<const Placement> ranks) {
  Matching matching(ranks);
  for (std::size_t rank = 0; rank < ranks.size(); ++rank) {
    if (!matching.place(rank)) {
      return false;
    }
  }
  return true;
}

}  // namespace distro::exchange
