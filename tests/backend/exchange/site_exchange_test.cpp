// Sites: ranks that hold the same weights and exchange as one participant.

#include <gtest/gtest.h>

#include <string>

#include "tests/backend/exchange/ranks.h"

namespace distro::exchange::testing {
namespace {

constexpr int kSteps = 40;

// Checksums of W and all weights after each sync point, by rank.
struct History {
  std::vector<std::uint64_t> checksums;
  std::vector<std::vector<std::vector<float>>> weights;
};

std::vector<History> train(const Setting& setting) {
  std::vector<History> history(static_cast<std::size_t>(setting.ranks));
  expect_ranks(setting, [&](Rank& rank) {
    History& own = history[static_cast<std::size_t>(rank.rank)];
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 0; step < kSteps; ++step) {
      rank.move();
      rank.sync();
      own.checksums.push_back(rank.exchange->checksum());
      own.weights.push_back(rank.weights);
    }
    rank.exchange->average(rank.views(), *rank.exact);
    own.checksums.push_back(rank.exchange->checksum());
  });
  return history;
}

void expect_all(const std::vector<std::string>& errors, const std::string& words) {
  for (const auto& error : errors) {
    EXPECT_NE(error.find(words), std::string::npos) << error;
  }
}

class Sites : public ::testing::TestWithParam<std::tuple<std::string, std::string>> {};

TEST_P(Sites, OfEqualSizeAreSoManyRanksBitForBit) {
  const auto& [delay, carrier] = GetParam();
  const StringMap options = {{"transport", carrier}, {"delay", delay}};
  const auto alone = train({.ranks = 2, .options = options});
  const std::vector<std::vector<std::string>> arrangements = {{"a", "a", "b", "b"},
                                                              {"a", "b", "b", "a", "a", "b"}};
  for (const auto& sites : arrangements) {
    const auto houses =
        train({.ranks = static_cast<int>(sites.size()), .options = options, .sites = sites});
    for (std::size_t rank = 0; rank < sites.size(); ++rank) {
      const History& same = alone[sites[rank] == "a" ? 0 : 1];
      EXPECT_EQ(houses[rank].weights, same.weights) << "rank " << rank;
      // But for the last, after the mean of six values in the place of two.
      EXPECT_TRUE(std::equal(same.checksums.begin(), same.checksums.end() - 1,
                             houses[rank].checksums.begin()));
      EXPECT_EQ(houses[rank].checksums, houses[0].checksums);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DelayAndCarrier, Sites,
                         ::testing::Combine(::testing::Values("0", "1"),
                                            ::testing::Values("tcp", "inproc")));

TEST(SiteFault, AReferenceThatDriftsInASiteIsFoundByItsLeader) {
  const auto errors = run_ranks(
      {.ranks = 3, .options = {{"transport", "inproc"}}, .sites = {"a", "a", "b"}}, [](Rank& rank) {
        if (rank.rank == 1) {
          rank.weights[0][0] += 1.0F;  // before W is taken from them
        }
        rank.exchange->begin(rank.views(), *rank.exact);
        rank.weights[1][5] += rank.rank == 1 ? 1e-6F : 0.0F;
        for (int step = 0; step < 20; ++step) {
          rank.move();
          rank.sync();
        }
      });
  expect_all(errors, "weights of site 'a' (ranks 0, 1) are not the same on its ranks");
}

// Rank 1 of site (0, 1) writes `forged` to its leader before the module begins.
std::vector<std::string> errors_of(const Envelope& forged, const std::vector<std::byte>& body) {
  return run_ranks(
      {.ranks = 4, .options = {{"transport", "inproc"}}, .sites = {"a", "a", "b", "b"}},
      [&](Rank& rank) {
        if (rank.rank == 1) {
          rank.group->broadcast(seal(forged, body));
          rank.group->take(0, {0, MessageKind::begin, 0}, rank.group->deadline());
        }
        rank.exchange->begin(rank.views(), *rank.exact);
      });
}

TEST(SiteFault, AMessageInTheNameOfARankThatItsSenderDoesNotSpeakForIsRefused) {
  const std::vector<std::byte> eight(sizeof(std::uint64_t));
  expect_all(errors_of({.kind = MessageKind::begin, .origin = 2}, eight),
             "rank 1 sent a message of kind 1 in the name of rank 2");
  expect_all(errors_of({.kind = MessageKind::begin, .origin = 0}, eight), "in the name of rank 0");
  expect_all(errors_of({.kind = MessageKind::begin, .origin = 99}, eight),
             "in the name of rank 99");
}

TEST(SiteFault, AStepOfARankThatDoesNotLeadItsSiteIsRefused) {
  expect_all(errors_of({.kind = MessageKind::step, .origin = 1, .exchange = 1}, {}),
             "rank 1 sent a message of kind 2 in the name of rank 1");
}

}  // namespace
}  // namespace distro::exchange::testing
