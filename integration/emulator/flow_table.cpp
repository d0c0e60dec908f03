#include "integration/emulator/flow_table.h"

#include <algorithm>
#include <cstdint>

namespace distro::emulator {
namespace {

// Fewer: flows push each other out; more: memory for flows that nobody has. A power of two.
constexpr std::size_t kSets = 1024;

// Home routers forget a flow that rests for minutes (UDP) to hours (TCP). Shorter: what rests
// between two heartbeats is cut; longer: programs that never send a heartbeat go unnoticed.
constexpr Time kRest = std::chrono::minutes(5);

// Spreads all bits of a key over the result (the finalizer of SplitMix64).
std::uint64_t mixed(std::uint64_t key) {
  key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9U;
  key = (key ^ (key >> 27)) * 0x94d049bb133111ebU;
  return key ^ (key >> 31);
}

}  // namespace

FlowTable::FlowTable() : sets_(kSets) {}

FlowTable::Set& FlowTable::set_of(const Flow& outbound) {
  const auto ports = (std::uint64_t{outbound.source_port} << 16) | outbound.destination_port;
  const auto ends = (std::uint64_t{outbound.source} << 32) | outbound.destination;
  return sets_[mixed(mixed(ends) ^ ((ports << 8) | outbound.protocol)) & (kSets - 1)];
}

FlowTable::Entry* FlowTable::find(const Flow& outbound, Time now) {
  auto& set = set_of(outbound);
  const auto entry = std::find_if(set.begin(), set.end(), [&](const Entry& each) {
    return each.used && each.flow == outbound && now - each.last <= kRest;
  });
  return entry == set.end() ? nullptr : &*entry;
}

void FlowTable::note(const Flow& outbound, Time now) {
  Entry* entry = find(outbound, now);
  if (entry == nullptr) {
    auto& set = set_of(outbound);
    entry = &*std::min_element(set.begin(), set.end(), [](const Entry& a, const Entry& b) {
      return a.used != b.used ? b.used : a.last < b.last;
    });
  }
  *entry = {outbound, now, true};
}

bool FlowTable::admits(const Flow& inbound, Time now) {
  Entry* const entry = find(inbound.reversed(), now);
  if (entry == nullptr) {
    return false;
  }
  entry->last = now;
  return true;
}

}  // namespace distro::emulator
