#pragma once

#include <cstddef>
#include <optional>

#include "integration/emulator/packet.h"

namespace distro::emulator {

/// One direction of a home line: packets leave one after the other at a rate, and what finds the
/// queue before it full is dropped. Nothing is stored: a packet's departure is known when it comes.
class Lane {
 public:
  /// What is in the queue already still goes at the old rate.
  ///
  /// \param bytes_per_second 0: no limit, and no queue.
  /// \param queue_bytes what may wait; a packet that finds nothing waiting always passes.
  void set(double bytes_per_second, double queue_bytes);

  /// When a packet that comes `now` has left; nothing: it is dropped.
  std::optional<Time> admit(std::size_t bytes, Time now);

 private:
  double bytes_per_second_ = 0;
  double queue_bytes_ = 0;
  Time free_{0};  // when all that was admitted has left
};

}  // namespace distro::emulator
