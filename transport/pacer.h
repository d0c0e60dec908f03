#pragma once

#include <cstddef>
#include <cstdint>

#include "transport/channel.h"

namespace distro::transport {

/// The rate at which a process may send (a token bucket of one chunk), shared by all its channels.
/// Exact transfers take only what exchanges leave. I/O thread.
class Pacer {
 public:
  /// Bytes a second; 0: no limit.
  void set_rate(std::uint64_t bytes_per_second, Deadline now) noexcept;

  /// Whether a frame of so many bytes may go now; if so it is counted. If not, ask again at
  /// ready_at().
  bool take(std::size_t bytes, Priority priority, Deadline now) noexcept;
  /// Give back what a frame was counted for that the carrier did not take.
  void give_back(std::size_t bytes) noexcept {
    balance_ += rate_ == 0 ? 0 : static_cast<double>(bytes);
  }
  [[nodiscard]] Deadline ready_at(Priority priority, Deadline now) const noexcept;

 private:
  void refill(Deadline now) noexcept;

  double rate_ = 0;     // bytes a second
  double balance_ = 0;  // bytes; below 0 after a frame: the time until it is paid for
  Deadline refilled_at_{};
  Deadline exchange_waits_until_{};  // an exchange was refused, and comes back before this
};

}  // namespace distro::transport
