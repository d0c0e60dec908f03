#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "transport/channel.h"

namespace distro::transport::test {

using std::chrono::milliseconds;

inline Deadline in(milliseconds time) { return Clock::now() + time; }

/// Bytes that depend on the seed, so that a message taken for another is noticed.
Bytes pattern(std::size_t size, std::uint64_t seed);
SharedBytes shared_pattern(std::size_t size, std::uint64_t seed);

std::string name(Carrier carrier);

/// TEST_SEED, or a fixed number; printed, so that a failure can be repeated.
std::uint64_t test_seed();

/// Whether a rank's receive says that `culprit` is lost, and why.
::testing::AssertionResult loses(Channel& channel, int peer, int culprit, const std::string& why);

/// Whether this comes true within five seconds.
bool becomes(const std::function<bool()>& condition);

/// Defaults that suit tests: loopback, short times.
ChannelConfig config(Carrier carrier, int rank, int world_size);

/// A group whose ranks all live in this process.
class Group {
 public:
  using Tune = std::function<void(ChannelConfig&)>;

  /// Opens and connects all ranks. `tune` may change each rank's options.
  Group(Carrier carrier, int world_size, const Tune& tune = {});

  [[nodiscard]] int size() const { return static_cast<int>(channels.size()); }
  Channel& operator[](int rank) { return *channels[static_cast<std::size_t>(rank)]; }

  /// Run the body for each rank on a thread of its own; rethrows the first exception.
  void each(const std::function<void(int rank, Channel& channel)>& body);
  void close_all();

  std::vector<std::unique_ptr<Channel>> channels;
  std::vector<PeerAddress> addresses;
};

/// Messages of ranks 0 and 1 to each other arrive.
void expect_works(Group& group, std::uint64_t seed);

}  // namespace distro::transport::test
