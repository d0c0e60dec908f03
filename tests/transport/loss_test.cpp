#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <thread>
#include <tuple>

#include "tests/transport/group.h"
#include "tests/transport/rank_process.h"
#include "transport/channel.h"

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

class KilledRank : public testing::TestWithParam<std::tuple<Carrier, int>> {};

// Rank `victim` of three is another process. It sends one message to each and is killed.
TEST_P(KilledRank, IsNamedByAllSurvivorsAfterItsMessages) {
  const auto [carrier, victim] = GetParam();
  RankProcess process(config(carrier, victim, 3), [&, victim = victim](Channel& channel) {
    for (int peer = 0; peer < 3; ++peer) {
      if (peer != victim) {
        channel.send(peer, shared_pattern(1000, 1));
      }
    }
    ::pause();
  });
  std::vector<std::unique_ptr<Channel>> survivors;
  std::vector<PeerAddress> addresses;
  for (int rank = 0; rank < 3; ++rank) {
    if (rank == victim) {
      addresses.push_back(process.address());
      continue;
    }
    survivors.push_back(open_channel(config(carrier, rank, 3)));
    addresses.push_back(survivors.back()->address());
  }
  for (const auto& channel : survivors) {
    channel->connect(addresses);
  }
  process.connect(addresses);
  for (const auto& channel : survivors) {
    EXPECT_EQ(channel->receive(victim, in(seconds(10))), pattern(1000, 1));
  }
  const auto killed = Clock::now();
  process.kill();
  const int first = victim == 0 ? 1 : 0;
  const int second = victim == 2 ? 1 : 2;
  const std::string why =
      "process (pid " + std::to_string(process.pid()) + ") ended without a goodbye";
  EXPECT_TRUE(loses(*survivors[0], second, victim, why));
  EXPECT_TRUE(loses(*survivors[1], first, victim, why));
  EXPECT_LT(Clock::now() - killed, seconds(3));
  EXPECT_THROW(survivors[0]->send(victim, shared_pattern(1, 1)), PeerLost);
  for (const auto& channel : survivors) {
    std::thread([&] { channel->close(in(seconds(5))); }).join();
  }
}

INSTANTIATE_TEST_SUITE_P(Carriers, KilledRank,
                         testing::Combine(testing::Values(Carrier::tcp, Carrier::ipc,
                                                          Carrier::plugin),
                                          testing::Values(0, 1, 2)),
                         [](const auto& param_info) {
                           return name(std::get<0>(param_info.param)) + "_rank_" +
                                  std::to_string(std::get<1>(param_info.param));
                         });

TEST(Loss, ARankKilledBeforeItConnectedIsNamed) {
  RankProcess process(config(Carrier::tcp, 1, 2), [](Channel&) {});
  const auto channel = open_channel(config(Carrier::tcp, 0, 2));
  channel->connect({channel->address(), process.address()});
  process.kill();
  EXPECT_TRUE(loses(*channel, 1, 1, "before it connected"));
}

TEST(Loss, ARankThatNeverConnectsIsLostAfterTheTimeout) {
  ChannelConfig options = config(Carrier::tcp, 0, 2);
  options.timeout = milliseconds(400);
  const auto channel = open_channel(options);
  PeerAddress nobody = channel->address();
  nobody.host = "elsewhere";
  channel->connect({channel->address(), nobody});
  EXPECT_TRUE(loses(*channel, 1, 1, "never connected within"));
}

TEST(Loss, ATimeoutThatIsChangedHoldsForWhoIsAwayAlready) {
  ChannelConfig options = config(Carrier::tcp, 0, 2);
  options.timeout = milliseconds(300);
  const auto channel = open_channel(options);
  PeerAddress nobody = channel->address();
  nobody.host = "elsewhere";
  channel->connect({channel->address(), nobody});
  channel->set_timeout(seconds(60));
  EXPECT_THROW(channel->receive(1, in(milliseconds(700))), PeerTimeout);
  channel->set_timeout(milliseconds(300));
  EXPECT_TRUE(loses(*channel, 1, 1, "never connected within"));
}

TEST(Loss, LateDeliverySaysWhoAndForHowLong) {
  Group group(Carrier::tcp, 2);
  group[1].send(0, shared_pattern(1, 1));
  group[0].receive(1, in(seconds(5)));
  try {
    group[0].receive(1, in(milliseconds(300)));
    FAIL() << "received something";
  } catch (const PeerTimeout& error) {
    EXPECT_EQ(error.rank(), 1);
    const std::string what = error.what();
    EXPECT_NE(what.find("rank 1 did not deliver within 0.3 s (connected; last heard of"),
              std::string::npos)
        << what;
  }
  group.close_all();
}

// What multiprocessing does after an exception: no destructor runs.
TEST(Loss, ARankThatFailsAndEndsAtOnceBlamesTheCulprit) {
  for (int round = 0; round < 20; ++round) {
    RankProcess process(config(Carrier::tcp, 0, 3), [](Channel& channel) {
      channel.receive(1, in(seconds(5)));
      channel.abort(2, "fire");
      channel.await_answers(in(seconds(5)));
    });
    std::vector<PeerAddress> addresses{process.address()};
    std::vector<std::unique_ptr<Channel>> others;
    for (int rank = 1; rank < 3; ++rank) {
      others.push_back(open_channel(config(Carrier::tcp, rank, 3)));
      addresses.push_back(others.back()->address());
    }
    for (const auto& channel : others) {
      channel->connect(addresses);
    }
    process.connect(addresses);
    others[0]->send(0, shared_pattern(1, 1));
    EXPECT_TRUE(loses(*others[0], 0, 2, "fire (told by rank 0)"));
  }
}

TEST(Loss, NobodyIsAwaitedWhoDoesNotAnswer) {
  RankProcess process(config(Carrier::tcp, 0, 2), [](Channel& channel) {
    channel.send(1, shared_pattern(1, 1));
    channel.receive(1, in(seconds(5)));
    ::raise(SIGSTOP);
  });
  const auto channel = open_channel(config(Carrier::tcp, 1, 2));
  channel->connect({process.address(), channel->address()});
  process.connect({process.address(), channel->address()});
  EXPECT_EQ(channel->receive(0, in(seconds(5))), pattern(1, 1));
  channel->send(0, shared_pattern(1, 1));
  int status = 0;
  ASSERT_EQ(::waitpid(process.pid(), &status, WUNTRACED), process.pid());
  std::this_thread::sleep_for(milliseconds(200));  // what it sent before is heard by then
  const auto until = in(milliseconds(300));
  channel->await_answers(until);
  EXPECT_GE(Clock::now(), until);
  process.kill();
}

class Abort : public testing::TestWithParam<Carrier> {};

TEST_P(Abort, NamesTheCulpritEverywhereAfterWhatArrived) {
  Group group(GetParam(), 3);
  group[1].send(0, shared_pattern(200'000, 1));
  while (group[0].counters().socket_bytes_received < 200'000) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  std::this_thread::sleep_for(milliseconds(20));
  group[1].abort(2, "rank 2 is on fire");
  EXPECT_EQ(group[0].receive(1, in(seconds(5))), pattern(200'000, 1));
  EXPECT_TRUE(loses(group[0], 1, 2, "on fire (told by rank 1)"));
  EXPECT_TRUE(loses(group[1], 0, 2, "on fire"));
  EXPECT_TRUE(loses(group[2], 0, 2, "on fire"));
  group[0].abort(1, "too late to blame another");
  EXPECT_TRUE(loses(group[0], 1, 2, "on fire"));
  group.close_all();
}

TEST_P(Abort, OfASurvivorThatExitsAtOnceStillBlamesTheCulprit) {
  for (int round = 0; round < 3; ++round) {
    Group group(GetParam(), 3);
    group.each([&](int rank, Channel& channel) {
      channel.send((rank + 1) % 3, shared_pattern(1, 1));
      channel.receive((rank + 2) % 3, in(seconds(5)));
    });
    group[1].abort(2, "fire");
    group.channels[1].reset();
    EXPECT_TRUE(loses(group[0], 1, 2, "fire (told by rank 1)"));
  }
}

TEST_P(Abort, IsWhatTheDestructorTellsTheOthers) {
  Group group(GetParam(), 3);
  group.each([&](int rank, Channel& channel) {
    channel.send((rank + 1) % 3, shared_pattern(1, 1));
    channel.receive((rank + 2) % 3, in(seconds(5)));
  });
  group.channels[1].reset();
  EXPECT_TRUE(loses(group[0], 2, 1, "without a goodbye"));
  EXPECT_TRUE(loses(group[2], 0, 1, "without a goodbye"));
}

INSTANTIATE_TEST_SUITE_P(Carriers, Abort,
                         testing::Values(Carrier::tcp, Carrier::ipc, Carrier::inproc),
                         [](const auto& param_info) { return name(param_info.param); });

}  // namespace
}  // namespace distro::transport::test
