// What ranks must agree on beside the weights themselves: that a module is exchanged at all, its
// gain, how far they are, the size of its records.

#include <gtest/gtest.h>

#include <array>

#include "tests/backend/exchange/ranks.h"

namespace distro::exchange::testing {
namespace {

const StringMap kInproc = {{"transport", "inproc"}};

void expect_all(const std::vector<std::string>& errors, const std::vector<std::string>& parts) {
  for (std::size_t rank = 0; rank < errors.size(); ++rank) {
    for (const auto& part : parts) {
      EXPECT_NE(errors[rank].find(part), std::string::npos)
          << "rank " << rank << " says: " << errors[rank];
    }
  }
}

TEST(Agreement, AModuleThatIsExactOnOneRankOnlyIsAnErrorOnAllThatSaysWhy) {
  const auto errors = run_ranks({.ranks = 3, .options = kInproc}, [&](Rank& rank) {
    if (rank.rank == 1) {
      rank.exchange->stay_exact(rank.views(), *rank.exact, "a hook of its own");
    } else {
      rank.exchange->begin(rank.views(), *rank.exact);
    }
  });
  expect_all(errors, {"ranks 0, 2 exchange its weights",
                      "rank 1 reduces its gradients exactly (a hook of its own)"});
}

TEST(Agreement, ARankThatStopsExchangingAloneIsAnErrorOnAll) {
  for (const std::string delay : {"0", "1"}) {
    const auto errors =
        run_ranks({.options = {{"transport", "inproc"}, {"delay", delay}}}, [&](Rank& rank) {
          rank.exchange->begin(rank.views(), *rank.exact);
          rank.move();
          rank.sync();
          rank.move();
          if (rank.rank == 1) {
            rank.exchange->stay_exact(rank.views(), *rank.exact, "a sharded step");
          }
          rank.sync();
          rank.sync();
        });
    expect_all(errors,
               {"rank 0 exchanges", "rank 1 reduces its gradients exactly (a sharded step)"});
  }
}

TEST(Agreement, RanksThatStopTogetherHaveTheMean) {
  std::array<std::vector<std::vector<float>>, 2> weights;
  expect_ranks({.options = kInproc}, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 0; step < 3; ++step) {
      rank.move();
      rank.sync();
    }
    rank.move();
    rank.exchange->stay_exact(rank.views(), *rank.exact, rank.rank == 0 ? "one reason" : "another");
    weights[static_cast<std::size_t>(rank.rank)] = rank.weights;
    EXPECT_EQ(rank.group->counters().reference_checksum, 0U);
  });
  EXPECT_EQ(weights[0], weights[1]);
}

TEST(Agreement, AverageOfARankThatHasRunAForwardAloneIsTheMean) {
  std::array<std::vector<std::vector<float>>, 3> averaged;
  std::array<std::uint64_t, 3> checksums{};
  expect_ranks({.ranks = 3, .options = kInproc}, [&](Rank& rank) {
    const auto at = static_cast<std::size_t>(rank.rank);
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 0; step < 4; ++step) {
      rank.move();
      rank.sync();
    }
    rank.move();
    if (rank.rank == 1) {
      rank.sync();  // an evaluation with gradients enabled, by this rank only
    }
    rank.exchange->average(rank.views(), *rank.exact);
    averaged[at] = rank.weights;
    EXPECT_EQ(rank.exchange->exchanges(), 5U);
    for (int step = 0; step < 3; ++step) {
      rank.move();
      rank.sync();
    }
    checksums[at] = rank.exchange->checksum();
  });
  EXPECT_EQ(averaged[0], averaged[1]);
  EXPECT_EQ(averaged[0], averaged[2]);
  EXPECT_EQ(checksums[0], checksums[1]);
  EXPECT_EQ(checksums[0], checksums[2]);
}

TEST(Agreement, AModuleWhoseRecordsNobodyCouldKeepIsRefusedAtOnce) {
  const StringMap options = {{"transport", "inproc"}, {"k", "4096"}, {"value_bits", "32"}};
  const auto errors = run_ranks({.options = options}, [&](Rank& rank) {
    const WeightsExchange fits(rank.group, {{"small", kernels::DType::f32, {1 << 20}}});
    const WeightsExchange large(rank.group, {{"large", kernels::DType::f32, {300'000'000}}});
  });
  expect_all(errors, {"300000000 weights", "DISTRO_K=4096 and 32 bits", "Options(value_bits)"});
}

TEST(Agreement, TheGroupsChecksumIsTheSumOverItsModules) {
  expect_ranks({.options = kInproc}, [&](Rank& rank) {
    std::vector<float> second(5000, 1.0F);
    const std::array views = {
        plugins::TensorView{second.data(), kernels::DType::f32, second.size()}};
    WeightsExchange other(rank.group, {{"second", kernels::DType::f32, {5000}}});
    rank.exchange->begin(rank.views(), *rank.exact);
    other.begin(views, *rank.exact);
    for (int step = 0; step < 3; ++step) {
      rank.move();
      rank.sync();
      second[7] += 1.0F;
      other.sync(views, *rank.exact, 1.0F);
      EXPECT_EQ(rank.group->counters().reference_checksum,
                rank.exchange->checksum() + other.checksum());
    }
  });
}

TEST(Agreement, WeightsThatMoveWithoutAKnownOptimizerAreWarnedOfOnce) {
  ::testing::internal::CaptureStderr();
  expect_ranks({.options = kInproc}, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 0; step < 5; ++step) {
      rank.move();
      rank.exchange->sync(rank.views(), *rank.exact, kGainUnknown);
    }
  });
  const std::string text = ::testing::internal::GetCapturedStderr();
  for (const std::string rank : {"rank 0", "rank 1"}) {
    const std::string warning = rank + "] module 0: its weights move, but no torch.optim";
    const auto found = text.find(warning);
    ASSERT_NE(found, std::string::npos) << text;
    EXPECT_EQ(text.find(warning, found + 1), std::string::npos) << text;
  }
  EXPECT_NE(text.find("multiplied by 1.41"), std::string::npos) << text;
}

}  // namespace
}  // namespace distro::exchange::testing
