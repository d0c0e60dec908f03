#include "transport/pacer.h"

#include <algorithm>
#include <chrono>

namespace distro::transport {
namespace {

using Seconds = std::chrono::duration<double>;

// How long an exact transfer stands back for an exchange that was refused and has not come back.
// Shorter: a busy I/O thread lets the large transfer go first; longer: after an exchange that was
// given up the line stands still.
constexpr auto kStandBack = std::chrono::milliseconds(50);

// What may gather while nothing is sent, in seconds of the rate. Less: the I/O thread's wake-ups
// cost rate; more: a burst that fills the line's queue.
constexpr double kBurstSeconds = 0.005;

}  // namespace

void Pacer::set_rate(std::uint64_t bytes_per_second, Deadline now) noexcept {
  rate_ = static_cast<double>(bytes_per_second);
  balance_ = 0;
  refilled_at_ = now;
}

void Pacer::refill(Deadline now) noexcept {
  const double earned = Seconds(now - refilled_at_).count() * rate_;
  balance_ = std::min(balance_ + earned, kBurstSeconds * rate_);
  refilled_at_ = now;
}

bool Pacer::take(std::size_t bytes, Priority priority, Deadline now) noexcept {
  if (rate_ == 0) {
    return true;
  }
  refill(now);
  const bool exchange = priority == Priority::exchange;
  if (!exchange && now < exchange_waits_until_) {
    return false;
  }
  if (balance_ < 0) {
    if (exchange) {
      exchange_waits_until_ = ready_at(priority, now) + kStandBack;
    }
    return false;
  }
  if (exchange) {
    exchange_waits_until_ = {};
  }
  balance_ -= static_cast<double>(bytes);
  return true;
}

Deadline Pacer::ready_at(Priority priority, Deadline now) const noexcept {
  if (rate_ == 0) {
    return now;
  }
  const auto paid = std::chrono::ceil<Clock::duration>(Seconds(std::max(0.0, -balance_) / rate_));
  const Deadline ready = std::max(now, refilled_at_ + paid);
  return priority == Priority::exchange ? ready : std::max(ready, exchange_waits_until_);
}

}  // namespace distro::transport
