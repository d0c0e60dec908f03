#include "tests/transport/impaired_link.h"

#include <algorithm>
#include <utility>

namespace distro::transport::test {
namespace {

constexpr auto kLatency = std::chrono::milliseconds(5);
constexpr auto kDetour = std::chrono::milliseconds(12);

}  // namespace

void ImpairedLink::send(Bytes frame, Deadline now) {
  if (happens(impairment_.loss)) {
    return;
  }
  if (happens(impairment_.duplication)) {
    under_way_.push_back({now + kLatency + kDetour, frame});
  }
  const auto latency = kLatency + (happens(impairment_.reordering) ? kDetour : Clock::duration(0));
  under_way_.push_back({now + latency, std::move(frame)});
}

std::optional<Bytes> ImpairedLink::receive(Deadline now) {
  const auto next =
      std::min_element(under_way_.begin(), under_way_.end(),
                       [](const Flight& a, const Flight& b) { return a.arrival < b.arrival; });
  if (next == under_way_.end() || next->arrival > now) {
    return std::nullopt;
  }
  Bytes frame = std::move(next->frame);
  under_way_.erase(next);
  return frame;
}

}  // namespace distro::transport::test
