#include "backend/exchange/sites.h"

#include <gtest/gtest.h>

#include <cmath>

namespace distro::exchange {
namespace {

std::vector<int> members(const Sites& sites, int participant) {
  const auto ranks = sites.members(participant);
  return {ranks.begin(), ranks.end()};
}

TEST(Sites, AreInTheOrderOfTheirLowestRanks) {
  const Sites sites({"b", "", "a", "b", ""});
  ASSERT_EQ(sites.participants(), 4);
  EXPECT_EQ(members(sites, 0), (std::vector<int>{0, 3}));
  EXPECT_EQ(members(sites, 1), std::vector<int>{1});
  EXPECT_EQ(members(sites, 2), std::vector<int>{2});
  EXPECT_EQ(members(sites, 3), std::vector<int>{4});
  EXPECT_EQ(sites.leader_of(3), 0);
  EXPECT_TRUE(sites.leads(0));
  EXPECT_FALSE(sites.leads(3));
  EXPECT_FALSE(sites.even());
  EXPECT_EQ(sites.name(0), "site 'b' (ranks 0, 3)");
  EXPECT_EQ(sites.name(1), "rank 1");
  EXPECT_EQ(sites.text(), "site 'b' (ranks 0, 3), rank 1, site 'a' (rank 2), rank 4");
}

TEST(Sites, CountByTheirRanks) {
  const Sites sites({"a", "b", "b", "b"});
  EXPECT_EQ(sites.weight(0), 0.25F);
  EXPECT_EQ(sites.weight(1), 0.75F);
  // 1 / sqrt(1/16 + 9/16)
  EXPECT_FLOAT_EQ(sites.gain(), std::sqrt(1.6F));
  EXPECT_FLOAT_EQ(sites.share(0, sites.gain()) + sites.share(1, sites.gain()), sites.gain());
}

TEST(Sites, OfOneSizeComputeAsSoManyRanksBitForBit) {
  for (const int houses : {2, 3, 5, 7}) {
    const Sites alone = Sites::none(houses);
    EXPECT_EQ(alone.gain(), std::sqrt(static_cast<float>(houses)));
    for (const int ranks : {2, 3, 8}) {
      std::vector<std::string> labels;
      for (int rank = 0; rank < houses * ranks; ++rank) {
        labels.push_back(std::to_string(rank % houses));
      }
      const Sites sites(labels);
      EXPECT_TRUE(sites.even());
      EXPECT_EQ(sites.gain(), alone.gain());
      EXPECT_EQ(sites.weight(1), alone.weight(1));
      EXPECT_EQ(sites.share(1, 1.7F), alone.share(1, 1.7F));
      EXPECT_EQ(sites.share(1, 1.7F), 1.7F / static_cast<float>(houses));
    }
  }
}

TEST(Sites, ByHostAreNoLabel) {
  EXPECT_EQ(site_label("", "h"), "");
  EXPECT_EQ(site_label("berlin", "h"), "berlin");
  EXPECT_NE(site_label("host", "h"), site_label("host", "i"));
  EXPECT_FALSE(is_site(site_label("host", "h")));
  EXPECT_EQ(Sites({site_label("host", "h"), site_label("host", "h")}).name(0),
            "the host of ranks 0, 1");
}

TEST(Sites, ForgottenOnSomeRanksOfAHostAreNamed) {
  const std::vector<Placement> hosts = {{"h", {}}, {"h", {}}, {"i", {}}};
  EXPECT_EQ(forgotten_site({"a", "a", ""}, hosts), "");
  EXPECT_EQ(forgotten_site({"", "", "a"}, hosts), "");
  EXPECT_EQ(forgotten_site({"a", "", "a"}, hosts),
            "DISTRO_SITE is set for rank 0 and not for rank 1 of the same host");
}

}  // namespace
}  // namespace distro::exchange
