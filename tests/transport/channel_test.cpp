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

TEST(Channel, OfAnyPeerComesWhatHasArrivedInTurn) {
  Group group(Carrier::inproc, 3);
  for (int number = 0; number < 3; ++number) {
    group[1].send(0, shared_pattern(5, static_cast<std::uint64_t>(number)));
  }
  group[2].send(0, shared_pattern(5, 10));
  int of_first = 0;
  int of_second = 0;
  while (of_first + of_second < 4) {
    const auto arrival = group[0].receive_any(in(seconds(10)));
    ASSERT_TRUE(arrival);
    if (arrival->peer == 1) {
      EXPECT_TRUE(arrival->message == pattern(5, static_cast<std::uint64_t>(of_first++)));
    } else {
      EXPECT_TRUE(arrival->message == pattern(5, 10));
      ++of_second;
    }
  }
  EXPECT_EQ(of_first, 3);
  EXPECT_FALSE(group[0].receive_any(in(milliseconds(1))).has_value());
  group.close_all();
}

TEST(Channel, AReceiverOfAnyPeerCanBeWoken) {
  Group group(Carrier::inproc, 2);
  group[0].wake();  // before: it is not lost
  EXPECT_FALSE(group[0].receive_any(Deadline::max()).has_value());
  std::thread waker([&] { group[0].wake(); });
  EXPECT_FALSE(group[0].receive_any(Deadline::max()).has_value());
  waker.join();
  group.close_all();
}

TEST(Channel, AReceiverOfAnyPeerHearsOnceWhoLeftAndAlwaysWhoIsLost) {
  Group group(Carrier::inproc, 3);
  group[1].send(0, shared_pattern(5, 1));
  group[1].close(in(seconds(10)));
  const auto last = group[0].receive_any(in(seconds(10)));
  ASSERT_TRUE(last);
  EXPECT_EQ(last->peer, 1);
  try {
    (void)group[0].receive_any(in(seconds(10)));
    FAIL() << "nobody left";
  } catch (const PeerLeft& left) {
    EXPECT_EQ(left.rank(), 1);
  }
  group[2].send(0, shared_pattern(5, 2));
  EXPECT_EQ(group[0].receive_any(in(seconds(10)))->peer, 2);
  group[2].abort(2, "it burns");
  for (int time = 0; time < 2; ++time) {
    EXPECT_THROW((void)group[0].receive_any(in(seconds(10))), PeerLost);
  }
  group.close_all();
  EXPECT_THROW((void)group[0].receive_any(in(seconds(10))), ClosedError);
}

TEST(Channel, OneMessageForSeveralReachesThoseThatHaveNotLeft) {
  Group group(Carrier::inproc, 4);
  group[3].close(in(seconds(10)));
  EXPECT_THROW((void)group[0].receive(3, in(seconds(10))), PeerLeft);
  const std::vector<int> peers = {1, 2, 3};
  EXPECT_EQ(group[0].multicast(peers, shared_pattern(70'000, 1)), std::vector<int>{3});
  for (const int peer : {1, 2}) {
    EXPECT_TRUE(group[peer].receive(0, in(seconds(10))) == pattern(70'000, 1));
  }
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
