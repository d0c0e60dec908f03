// Channels of which some ranks are no neighbours: what a rank beyond does is told along the way.

#include <gtest/gtest.h>

#include <string>

#include "tests/transport/group.h"

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

// Ranks in a line: each knows the one before and the one after.
Group line(Carrier carrier, int ranks) {
  return {carrier, ranks, [ranks](ChannelConfig& config) {
            for (const int neighbour : {config.rank - 1, config.rank + 1}) {
              if (neighbour >= 0 && neighbour < ranks) {
                config.neighbours.push_back(neighbour);
              }
            }
          }};
}

class OverEveryCarrier : public testing::TestWithParam<Carrier> {};

TEST_P(OverEveryCarrier, NeighboursExchangeMessages) {
  Group group = line(GetParam(), 3);
  group[0].send(1, shared_pattern(1000, 1));
  group[2].send(1, shared_pattern(1000, 2));
  EXPECT_EQ(group[1].receive(0, in(seconds(10))), pattern(1000, 1));
  EXPECT_EQ(group[1].receive(2, in(seconds(10))), pattern(1000, 2));
  group.close_all();
}

TEST_P(OverEveryCarrier, WhoIsBlamedIsToldToRanksBeyond) {
  for (const int culprit : {0, 1, 3}) {
    Group group = line(GetParam(), 4);
    group[0].abort(culprit, "it is to blame");
    for (int rank = 1; rank < 4; ++rank) {
      EXPECT_TRUE(loses(group[rank], rank - 1, culprit, "it is to blame")) << "rank " << rank;
    }
  }
}

TEST_P(OverEveryCarrier, ARankThatFailsIsToldToRanksBeyond) {
  Group group = line(GetParam(), 4);
  group[0].send(1, shared_pattern(1, 1));
  EXPECT_EQ(group[1].receive(0, in(seconds(10))), pattern(1, 1));
  group.channels[0].reset();  // without a goodbye
  for (int rank = 1; rank < 4; ++rank) {
    EXPECT_TRUE(loses(group[rank], rank - 1, 0, "without a goodbye")) << "rank " << rank;
  }
}

INSTANTIATE_TEST_SUITE_P(Neighbours, OverEveryCarrier,
                         testing::Values(Carrier::tcp, Carrier::ipc, Carrier::inproc,
                                         Carrier::plugin),
                         [](const auto& param_info) { return name(param_info.param); });

TEST(Neighbours, OnlyTheyAreSentToAndReceivedFrom) {
  Group group = line(Carrier::inproc, 3);
  EXPECT_THROW(group[0].send(2, shared_pattern(1, 1)), ConfigError);
  EXPECT_THROW(group[0].receive(2, in(seconds(1))), ConfigError);
  group.close_all();
}

TEST(Neighbours, ASuspicionWaitsForNewsOfRanksBeyond) {
  Group group = line(Carrier::tcp, 3);
  group[1].send(0, shared_pattern(1, 1));
  EXPECT_EQ(group[0].receive(1, in(seconds(10))), pattern(1, 1));
  EXPECT_FALSE(group[0].suspect(in(milliseconds(300))).has_value());
  group[2].abort(2, "it is to blame");
  const auto found = group[0].suspect(in(seconds(10)));
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->rank(), 2);
}

}  // namespace
}  // namespace distro::transport::test
