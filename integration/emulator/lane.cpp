#include "integration/emulator/lane.h"

#include <algorithm>

namespace distro::emulator {
namespace {

// What a line that rested may send at once. Less: where this process wakes late, the time it slept
// is lost to the line; more: short bursts go faster than the line.
constexpr Time kBurst = std::chrono::milliseconds(1);

using Seconds = std::chrono::duration<double>;

}  // namespace

void Lane::set(double bytes_per_second, double queue_bytes) {
  bytes_per_second_ = bytes_per_second;
  queue_bytes_ = queue_bytes;
}

std::optional<Time> Lane::admit(std::size_t bytes, Time now) {
  const auto size = static_cast<double>(bytes);
  if (bytes_per_second_ <= 0) {
    // Not before those that were admitted at a lower rate.
    return std::max(now, free_);
  }
  const double waiting = std::max(0.0, Seconds(free_ - now).count() * bytes_per_second_);
  if (waiting > 0 && waiting + size > queue_bytes_) {
    return std::nullopt;
  }
  free_ = std::max(free_, now - kBurst) +
          std::chrono::duration_cast<Time>(Seconds(size / bytes_per_second_));
  return std::max(now, free_);
}

}  // namespace distro::emulator
