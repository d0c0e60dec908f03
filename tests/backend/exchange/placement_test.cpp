#include "backend/exchange/placement.h"

#include <gtest/gtest.h>

namespace distro::exchange::testing {
namespace {

bool own(const std::vector<Placement>& ranks) { return each_can_have_its_own(ranks); }

TEST(Placement, RanksThatSeeAllDevicesOfTheirHostShareThemOut) {
  EXPECT_TRUE(own({{"a", {"0", "1"}}, {"a", {"0", "1"}}, {"b", {"0"}}}));
  EXPECT_FALSE(own({{"a", {"0", "1"}}, {"a", {"0", "1"}}, {"a", {"0", "1"}}}));
}

TEST(Placement, ARankWithoutADeviceLeavesNoneToAll) {
  EXPECT_FALSE(own({{"a", {"0"}}, {"b", {}}}));
}

TEST(Placement, TwoRanksThatSeeOneDeviceDoNotHaveOneEach) {
  EXPECT_FALSE(own({{"a", {"0"}}, {"a", {"0"}}, {"a", {"1", "2"}}}));
  EXPECT_TRUE(own({{"a", {"0"}}, {"b", {"0"}}}));
}

TEST(Placement, ARankGivesWayToOneThatSeesFewer) {
  EXPECT_TRUE(own({{"a", {"0", "1", "2"}}, {"a", {"0", "1"}}, {"a", {"0"}}}));
}

}  // namespace
}  // namespace distro::exchange::testing
