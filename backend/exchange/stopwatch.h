#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace distro::exchange {

/// Adds the nanoseconds of a scope to a counter.
class Stopwatch {
 public:
  explicit Stopwatch(std::atomic<std::uint64_t>& total) : total_(total) {}
  ~Stopwatch() {
    const std::chrono::nanoseconds elapsed = std::chrono::steady_clock::now() - start_;
    total_.fetch_add(static_cast<std::uint64_t>(elapsed.count()), std::memory_order_relaxed);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  std::atomic<std::uint64_t>& total_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace distro::exchange
