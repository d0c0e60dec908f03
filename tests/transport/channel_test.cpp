#include "transport/channel.h"

#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <tuple>

#include "tests/transport/group.h"

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

class EveryCarrier : public testing::TestWithParam<std::tuple<Carrier, int, std::size_t>> {};

// Two messages of each rank to each other one, so that order and attribution show.
TEST_P(EveryCarrier, AllToAll) {
  const auto [carrier, ranks, size] = GetParam();
  Group group(carrier, ranks);
  const auto seed = [](int from, int to, int number) {
    return static_cast<std::uint64_t>(from * 1000 + to * 10 + number);
  };
  group.each([&, size = size](int rank, Channel& channel) {
    for (int number = 0; number < 2; ++number) {
      for (int peer = 0; peer < group.size(); ++peer) {
        if (peer != rank) {
          channel.send(peer, shared_pattern(size, seed(rank, peer, number)));
        }
      }
    }
    for (int number = 0; number < 2; ++number) {
      for (int peer = 0; peer < group.size(); ++peer) {
        if (peer != rank) {
          EXPECT_TRUE(channel.receive(peer, in(seconds(10))) ==
                      pattern(size, seed(peer, rank, number)));
        }
      }
    }
    channel.close(in(seconds(5)));
  });
  for (int rank = 0; rank < ranks; ++rank) {
    const ChannelCounters counters = group[rank].counters();
    EXPECT_EQ(counters.rejected_frames, 0U);
    EXPECT_EQ(counters.resent_frames, 0U);
    EXPECT_EQ(counters.duplicate_frames, 0U);
    EXPECT_GE(counters.socket_bytes_sent, 2 * size * static_cast<std::size_t>(ranks - 1));
    EXPECT_GE(counters.socket_bytes_received, 2 * size * static_cast<std::size_t>(ranks - 1));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Carriers, EveryCarrier,
    testing::Combine(testing::Values(Carrier::tcp, Carrier::ipc, Carrier::inproc, Carrier::plugin),
                     testing::Values(2, 4),
                     testing::Values(std::size_t{0}, std::size_t{1}, (std::size_t{64} << 10) - 1,
                                     std::size_t{64} << 10, std::size_t{3} << 20)),
    [](const auto& param_info) {
      return name(std::get<0>(param_info.param)) + "_" +
             std::to_string(std::get<1>(param_info.param)) + "_ranks_" +
             std::to_string(std::get<2>(param_info.param)) + "_bytes";
    });

TEST(Channel, TryReceiveDoesNotWait) {
  Group group(Carrier::inproc, 2);
  EXPECT_FALSE(group[0].try_receive(1).has_value());
  group[1].send(0, shared_pattern(5, 1));
  std::optional<Bytes> message;
  for (const auto deadline = in(seconds(5)); !message && Clock::now() < deadline;) {
    message = group[0].try_receive(1);
  }
  EXPECT_EQ(message, pattern(5, 1));
  group.close_all();
}

TEST(Channel, WorldOfOneOpensAndCloses) {
  Group group(Carrier::tcp, 1);
  group.close_all();
}

TEST(Channel, MisuseIsAnError) {
  EXPECT_THROW(open_channel(config(Carrier::inproc, 2, 2)), ConfigError);
  Group group(Carrier::inproc, 2, [](ChannelConfig& config) { config.max_message_bytes = 100; });
  EXPECT_THROW(group[0].send(0, shared_pattern(1, 1)), ConfigError);
  EXPECT_THROW(group[0].send(2, shared_pattern(1, 1)), ConfigError);
  EXPECT_THROW(group[0].send(1, shared_pattern(101, 1)), ConfigError);
  EXPECT_THROW(group[0].connect(group.addresses), ConfigError);
  group.close_all();
  EXPECT_THROW(group[0].send(1, shared_pattern(1, 1)), ClosedError);
  EXPECT_THROW(group[0].receive(1, in(seconds(1))), ClosedError);
}

TEST(Channel, AnotherProtocolVersionIsNamed) {
  auto channel = open_channel(config(Carrier::inproc, 0, 2));
  auto addresses = std::vector<PeerAddress>(2, channel->address());
  addresses[1].protocol += 1;
  try {
    channel->connect(addresses);
    FAIL() << "connected";
  } catch (const ProtocolError& error) {
    EXPECT_NE(std::string(error.what()).find("rank 1"), std::string::npos) << error.what();
  }
}

// The inbox of a slow reader fills; the sender waits but for a probe now and then, and nothing is
// lost.
TEST(Channel, SlowReaderHoldsTheSender) {
  Group group(Carrier::tcp, 2, [](ChannelConfig& config) {
    config.inbox_bytes = 1 << 20;
    config.window_bytes = 1 << 20;
    config.resend_after = milliseconds(250);
  });
  constexpr int kMessages = 60;
  constexpr std::size_t kSize = 200'000;
  for (int number = 0; number < kMessages; ++number) {
    group[0].send(1, shared_pattern(kSize, static_cast<std::uint64_t>(number)));
  }
  std::this_thread::sleep_for(milliseconds(600));
  // inbox, window, and a probe each resend_after
  EXPECT_LT(group[1].counters().socket_bytes_received, (2U << 20) + 8 * 65'576U);
  for (int number = 0; number < kMessages; ++number) {
    EXPECT_TRUE(group[1].receive(0, in(seconds(10))) ==
                pattern(kSize, static_cast<std::uint64_t>(number)));
  }
  group.close_all();
}

// What nobody takes does not fill the memory: a typed error, and room again once it is taken.
TEST(Channel, SendsThatThePeerDoesNotTakeEndInAnError) {
  Group group(Carrier::tcp, 2, [](ChannelConfig& config) {
    config.inbox_bytes = 1 << 20;
    config.window_bytes = 1 << 20;
    config.outbox_bytes = 10 << 20;
  });
  const auto message = shared_pattern(1 << 20, 1);
  int sent = 0;
  const auto send_until_full = [&] {
    for (; sent < 100; ++sent) {
      group[0].send(1, message);
    }
  };
  try {
    send_until_full();
    FAIL() << "took everything";
  } catch (const PeerBacklog& error) {
    EXPECT_EQ(error.rank(), 1);
    EXPECT_GE(sent, 10);
    EXPECT_LE(sent, 14);
  }
  for (int number = 0; number < sent; ++number) {
    EXPECT_TRUE(group[1].receive(0, in(seconds(10))) == *message);
  }
  for (const auto deadline = in(seconds(5)); Clock::now() < deadline;) {
    try {
      group[0].send(1, message);
      break;
    } catch (const PeerBacklog&) {
      std::this_thread::sleep_for(milliseconds(5));
    }
  }
  EXPECT_TRUE(group[1].receive(0, in(seconds(10))) == *message);
  group.close_all();
}

}  // namespace
}  // namespace distro::transport::test
