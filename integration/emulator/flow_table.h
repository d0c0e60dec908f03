#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "integration/emulator/packet.h"

namespace distro::emulator {

/// The flows that a home router remembers: those opened from inside. Of fixed size; where it is
/// full, the flow that rested longest is forgotten.
class FlowTable {
 public:
  FlowTable();

  /// A packet leaves the house.
  void note(const Flow& outbound, Time now);

  /// Whether a packet from outside belongs to a flow that was opened from inside.
  bool admits(const Flow& inbound, Time now);

 private:
  struct Entry {
    Flow flow;
    Time last{0};
    bool used = false;
  };
  static constexpr std::size_t kWays = 4;
  using Set = std::array<Entry, kWays>;

  Set& set_of(const Flow& outbound);
  Entry* find(const Flow& outbound, Time now);

  std::vector<Set> sets_;
};

}  // namespace distro::emulator
