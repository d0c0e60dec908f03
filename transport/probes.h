#pragma once

#include <algorithm>
#include <array>
#include <chrono>

#include "transport/channel.h"

namespace distro::transport {

/// When to look which connections of a ROUTER are gone: it reports one that broke without saying
/// whose. One thread.
class Probes {
 public:
  Probes() { at_.fill(Deadline::max()); }

  /// A connection broke: look at once, and again since ZeroMQ may take a moment to drop it from its
  /// table.
  void begin(Deadline now) noexcept {
    using std::chrono::milliseconds;
    at_ = {now, now + milliseconds(50), now + milliseconds(500)};
  }

  /// Whether to look now.
  bool take(Deadline now) noexcept {
    bool due = false;
    for (Deadline& at : at_) {
      if (now >= at) {
        at = Deadline::max();
        due = true;
      }
    }
    return due;
  }

  [[nodiscard]] Deadline next() const noexcept { return *std::ranges::min_element(at_); }

 private:
  std::array<Deadline, 3> at_{};
};

}  // namespace distro::transport
