#include <gtest/gtest.h>

#include <thread>

#include "tests/transport/group.h"
#include "transport/channel.h"

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

class Goodbye : public testing::TestWithParam<Carrier> {};

TEST_P(Goodbye, RanksThatCloseAtOnceFinishFast) {
  for (int round = 0; round < 5; ++round) {
    Group group(GetParam(), 4);
    group.each([&](int rank, Channel& channel) {
      for (int peer = 0; peer < 4; ++peer) {
        if (peer != rank) {
          channel.send(peer, shared_pattern(1000, 1));
        }
      }
      for (int peer = 0; peer < 4; ++peer) {
        if (peer != rank) {
          channel.receive(peer, in(seconds(10)));
        }
      }
      const auto began = Clock::now();
      channel.close(in(seconds(10)));
      EXPECT_LT(Clock::now() - began, milliseconds(900)) << "rank " << rank;
      EXPECT_FALSE(channel.lost()) << channel.lost()->what();
    });
  }
}

TEST_P(Goodbye, LateReaderStillGetsEverything) {
  Group group(GetParam(), 2);
  constexpr int kMessages = 30;
  for (int number = 0; number < kMessages; ++number) {
    group[0].send(1, shared_pattern(100'000, static_cast<std::uint64_t>(number)));
  }
  const auto began = Clock::now();
  group[0].close(in(seconds(10)));
  EXPECT_LT(Clock::now() - began, seconds(3));
  std::this_thread::sleep_for(milliseconds(700));
  for (int number = 0; number < kMessages; ++number) {
    EXPECT_TRUE(group[1].receive(0, in(seconds(5))) ==
                pattern(100'000, static_cast<std::uint64_t>(number)));
  }
  try {
    group[1].receive(0, in(seconds(5)));
    FAIL() << "received from a rank that left";
  } catch (const PeerLeft& error) {
    EXPECT_EQ(error.rank(), 0);
  }
  EXPECT_THROW(group[1].send(0, shared_pattern(1, 1)), PeerLeft);
  EXPECT_THROW(group[1].try_receive(0), PeerLeft);
  const auto before = Clock::now();
  group[1].close(in(seconds(10)));
  EXPECT_LT(Clock::now() - before, milliseconds(900));
  EXPECT_FALSE(group[1].lost());
}

// One rank is done while the other still sends to it: what it never reads keeps nobody.
TEST_P(Goodbye, SenderToARankThatLeftIsNotKept) {
  Group group(GetParam(), 2);
  std::thread closer([&] { group[1].close(in(seconds(10))); });
  try {
    for (int number = 0; number < 200; ++number) {
      group[0].send(1, shared_pattern(200'000, 1));
    }
  } catch (const PeerLeft&) {
  }
  closer.join();
  const auto before = Clock::now();
  group[0].close(in(seconds(10)));
  EXPECT_LT(Clock::now() - before, seconds(2));
}

INSTANTIATE_TEST_SUITE_P(Carriers, Goodbye,
                         testing::Values(Carrier::tcp, Carrier::ipc, Carrier::inproc,
                                         Carrier::plugin),
                         [](const auto& param_info) { return name(param_info.param); });

TEST(Close, GivesUpAtTheDeadlineIfThePeerNeverCame) {
  auto channel = open_channel(config(Carrier::tcp, 0, 2));
  PeerAddress nobody = channel->address();
  nobody.host = "elsewhere";
  channel->connect({channel->address(), nobody});
  channel->send(1, shared_pattern(10, 1));
  const auto began = Clock::now();
  channel->close(in(milliseconds(300)));
  EXPECT_GE(Clock::now() - began, milliseconds(290));
  EXPECT_LT(Clock::now() - began, seconds(2));
  channel->close(in(seconds(1)));  // idempotent
}

TEST(Close, WakesAReceiverOfAnotherThread) {
  Group group(Carrier::inproc, 2);
  std::thread receiver([&] { EXPECT_THROW(group[0].receive(1, in(seconds(20))), TransportError); });
  std::this_thread::sleep_for(milliseconds(50));
  group.close_all();
  receiver.join();
}

TEST(Suspect, NobodyWhileAllAnswer) {
  Group group(Carrier::tcp, 3);
  group.each([](int rank, Channel& channel) {
    for (int peer = 0; peer < 3; ++peer) {
      if (peer != rank) {
        channel.send(peer, shared_pattern(10, 1));
        channel.receive(peer, in(seconds(20)));
      }
    }
  });
  const auto began = Clock::now();
  EXPECT_EQ(group[0].suspect(in(seconds(60))), std::nullopt);
  EXPECT_LT(Clock::now() - began, seconds(30));  // as soon as they have answered
  group.close_all();
  EXPECT_EQ(group[0].suspect(in(seconds(60))), std::nullopt);
}

TEST(Suspect, ARankThatLeftUnlessOneIsLost) {
  Group group(Carrier::tcp, 3);
  group[1].close(in(seconds(20)));
  const auto left = group[0].suspect(in(milliseconds(200)));
  ASSERT_TRUE(left);
  EXPECT_EQ(left->rank(), 1);
  EXPECT_NE(std::string(left->what()).find("rank 1 left the group"), std::string::npos);
  group[2].abort(2, "gave up");
  EXPECT_THROW(group[0].receive(2, in(seconds(20))), PeerLost);
  const auto lost = group[0].suspect(in(seconds(60)));
  ASSERT_TRUE(lost);
  EXPECT_EQ(lost->rank(), 2);
}

}  // namespace
}  // namespace distro::transport::test
