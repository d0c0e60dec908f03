#include "tests/transport/group.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <future>
#include <random>
#include <thread>

#include "transport/plugin.h"

namespace distro::transport::test {

Bytes pattern(std::size_t size, std::uint64_t seed) {
  std::mt19937_64 random(seed + 1);
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; i += sizeof(std::uint64_t)) {
    const std::uint64_t word = random();
    std::memcpy(bytes.data() + i, &word, std::min(sizeof word, size - i));
  }
  return bytes;
}

SharedBytes shared_pattern(std::size_t size, std::uint64_t seed) {
  return std::make_shared<const Bytes>(pattern(size, seed));
}

std::string name(Carrier carrier) {
  switch (carrier) {
    case Carrier::tcp:
      return "tcp";
    case Carrier::ipc:
      return "ipc";
    case Carrier::inproc:
      return "inproc";
    case Carrier::plugin:
      return "plugin";
  }
  return "unknown";
}

std::uint64_t test_seed() {
  const char* text = std::getenv("TEST_SEED");
  const std::uint64_t seed = text == nullptr ? 20240607 : std::stoull(text);
  std::printf("TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

::testing::AssertionResult loses(Channel& channel, int peer, int culprit, const std::string& why) {
  try {
    channel.receive(peer, in(std::chrono::seconds(10)));
  } catch (const PeerLost& error) {
    const bool right =
        error.rank() == culprit && std::string(error.what()).find(why) != std::string::npos;
    return right ? ::testing::AssertionSuccess()
                 : ::testing::AssertionFailure()
                       << "blames rank " << error.rank() << ": " << error.what();
  } catch (const std::exception& error) {
    return ::testing::AssertionFailure() << error.what();
  }
  return ::testing::AssertionFailure() << "received something";
}

bool becomes(const std::function<bool()>& condition) {
  for (const auto deadline = in(std::chrono::seconds(5)); Clock::now() < deadline;) {
    if (condition()) {
      return true;
    }
    std::this_thread::sleep_for(milliseconds(5));
  }
  return condition();
}

ChannelConfig config(Carrier carrier, int rank, int world_size) {
  ChannelConfig config;
  config.rank = rank;
  config.world_size = world_size;
  config.group = 0x6772'6F75'70ULL;
  config.carrier = carrier;
  if (carrier == Carrier::plugin) {
    config.plugin = Plugin::load(DISTRO_EXAMPLE_TRANSPORT);
  }
  config.timeout = std::chrono::seconds(20);
  config.keepalive = milliseconds(500);
  return config;
}

Group::Group(Carrier carrier, int world_size, const Tune& tune) {
  for (int rank = 0; rank < world_size; ++rank) {
    ChannelConfig options = config(carrier, rank, world_size);
    if (tune) {
      tune(options);
    }
    channels.push_back(open_channel(options));
    addresses.push_back(channels.back()->address());
  }
  for (const auto& channel : channels) {
    channel->connect(addresses);
  }
}

void Group::each(const std::function<void(int rank, Channel& channel)>& body) {
  std::vector<std::future<void>> ranks;
  for (int rank = 0; rank < size(); ++rank) {
    ranks.push_back(std::async(std::launch::async, [&, rank] { body(rank, (*this)[rank]); }));
  }
  std::exception_ptr first;
  for (auto& rank : ranks) {
    try {
      rank.get();
    } catch (...) {
      first = first ? first : std::current_exception();
    }
  }
  if (first) {
    std::rethrow_exception(first);
  }
}

void Group::close_all() {
  each([](int, Channel& channel) { channel.close(in(std::chrono::seconds(5))); });
}

void expect_works(Group& group, std::uint64_t seed) {
  group[0].send(1, shared_pattern(100'000, seed));
  group[1].send(0, shared_pattern(100'000, seed + 1));
  EXPECT_TRUE(group[1].receive(0, in(std::chrono::seconds(5))) == pattern(100'000, seed));
  EXPECT_TRUE(group[0].receive(1, in(std::chrono::seconds(5))) == pattern(100'000, seed + 1));
}

}  // namespace distro::transport::test
