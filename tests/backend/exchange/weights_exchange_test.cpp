#include "backend/exchange/weights_exchange.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <numbers>
#include <string>
#include <thread>

#include "tests/backend/exchange/ranks.h"

namespace distro::exchange::testing {
namespace {

constexpr int kSteps = 200;

// Checksums of W after each sync point, by rank.
using History = std::vector<std::vector<std::uint64_t>>;

History train(const Setting& setting, int steps) {
  History history(static_cast<std::size_t>(setting.ranks));
  expect_ranks(setting, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 0; step < steps; ++step) {
      rank.move();
      rank.sync();
      history[static_cast<std::size_t>(rank.rank)].push_back(rank.exchange->checksum());
    }
    rank.exchange->average(rank.views(), *rank.exact);
    history[static_cast<std::size_t>(rank.rank)].push_back(rank.exchange->checksum());
  });
  return history;
}

class Ranks : public ::testing::TestWithParam<std::tuple<int, std::string>> {};

TEST_P(Ranks, KeepTheSameReferenceAtEveryStepOverEveryCarrier) {
  const auto& [ranks, delay] = GetParam();
  std::vector<History> by_carrier;
  for (const std::string carrier : {"tcp", "ipc", "inproc"}) {
    by_carrier.push_back(
        train({.ranks = ranks, .options = {{"transport", carrier}, {"delay", delay}}}, kSteps));
    for (const auto& history : by_carrier.back()) {
      EXPECT_EQ(history.size(), kSteps + 1U);
      EXPECT_EQ(history, by_carrier.back().front());
    }
  }
  EXPECT_EQ(by_carrier[0], by_carrier[1]);
  EXPECT_EQ(by_carrier[0], by_carrier[2]);
}

INSTANTIATE_TEST_SUITE_P(RanksAndDelay, Ranks,
                         ::testing::Combine(::testing::Values(2, 4), ::testing::Values("0", "1")));

TEST(WeightsExchange, AverageMakesAllWeightsEqualAndTrainingGoesOn) {
  std::array<std::vector<std::vector<float>>, 3> averaged;
  expect_ranks({.ranks = 3, .options = {{"transport", "inproc"}}}, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 0; step < 10; ++step) {
      rank.move();
      rank.sync();
      if (step == 4 || step == 9) {
        rank.exchange->average(rank.views(), *rank.exact);
        averaged[static_cast<std::size_t>(rank.rank)] = rank.weights;
      }
    }
  });
  EXPECT_EQ(averaged[0], averaged[1]);
  EXPECT_EQ(averaged[0], averaged[2]);
}

TEST(WeightsExchange, AnEditOnOneRankEndsInTheMeanOnAll) {
  for (const std::string delay : {"0", "1"}) {
    std::array<float, 2> seen{};
    expect_ranks({.options = {{"transport", "inproc"}, {"delay", delay}}}, [&](Rank& rank) {
      rank.exchange->begin(rank.views(), *rank.exact);
      for (int step = 0; step < 6; ++step) {
        if (step == 3 && rank.rank == 1) {
          for (auto& tensor : rank.weights) {
            std::ranges::fill(tensor, 8.0F);
          }
          rank.exchange->mark();
        }
        rank.sync();
      }
      EXPECT_EQ(rank.group->counters().resyncs, 1U) << "delay " << delay;
      seen[static_cast<std::size_t>(rank.rank)] = rank.weights[0][0];
    });
    EXPECT_EQ(seen[0], seen[1]);
    EXPECT_NEAR(seen[0], 4.0F, 0.5F);  // the mean of 8 and of a weight near 0
  }
}

TEST(WeightsExchange, ARankThatDoesNotKnowItsGainTakesTheOthers) {
  std::array<std::uint64_t, 2> checksums{};
  expect_ranks({.options = {{"transport", "inproc"}}}, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 0; step < 5; ++step) {
      rank.move();
      const bool knows = rank.rank == 0 || step > 2;
      rank.exchange->sync(rank.views(), *rank.exact, knows ? 1.0F : kGainUnknown);
    }
    checksums[static_cast<std::size_t>(rank.rank)] = rank.exchange->checksum();
  });
  EXPECT_EQ(checksums[0], checksums[1]);
}

TEST(WeightsExchange, AnotherGainLosesNothingOfWeightsWhoseTurnItIsNot) {
  constexpr std::size_t kTurns = 4;
  constexpr std::size_t kStretch = 16;
  constexpr std::size_t kMoves = 6;
  constexpr std::size_t kKnown = 4;  // the exchange at which the optimizer is known
  const auto gain = [](std::size_t exchange) {
    return exchange < kKnown ? std::numbers::sqrt2_v<float> : 1.0F;
  };
  std::array<std::vector<float>, 2> ended;
  std::vector<float> began;
  const Setting setting{.options = {{"transport", "inproc"},
                                    {"k", "4096"},
                                    {"value_bits", "32"},
                                    {"turns", std::to_string(kTurns)},
                                    {"spread", "0"}}};
  expect_ranks(setting, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    if (rank.rank == 0) {
      began = rank.weights[0];
    }
    for (std::size_t exchange = 1; exchange <= kMoves + 3 * kTurns; ++exchange) {
      if (exchange <= kMoves) {
        for (float& weight : rank.weights[0]) {
          weight += 0.01F * static_cast<float>(rank.rank + 1);
        }
      }
      rank.exchange->sync(rank.views(), *rank.exact,
                          exchange < kKnown ? kGainUnknown : gain(exchange));
    }
    ended[static_cast<std::size_t>(rank.rank)] = rank.weights[0];
  });
  for (std::size_t i = 0; i < began.size(); ++i) {
    double expected = began[i];
    std::size_t moved_at_last_turn = 0;
    for (std::size_t exchange = 1; exchange <= kMoves + kTurns; ++exchange) {
      if (exchange % kTurns == i / kStretch % kTurns) {
        const std::size_t moved = std::min(exchange, kMoves);
        expected += 0.015 * static_cast<double>(moved - moved_at_last_turn) *
                    static_cast<double>(gain(exchange));
        moved_at_last_turn = moved;
      }
    }
    ASSERT_NEAR(ended[0][i], expected, 1e-5) << "element " << i;
    ASSERT_NEAR(ended[1][i], expected, 1e-5) << "element " << i;
  }
}

TEST(WeightsExchange, RanksThatBeginApartTakeRankZerosWeights) {
  std::array<std::vector<std::vector<float>>, 2> begun;
  expect_ranks({.options = {{"transport", "inproc"}}, .same_start = false}, [&](Rank& rank) {
    const auto before = rank.weights;
    rank.exchange->begin(rank.views(), *rank.exact);
    if (rank.rank == 0) {
      EXPECT_EQ(rank.weights, before);
    }
    begun[static_cast<std::size_t>(rank.rank)] = rank.weights;
  });
  EXPECT_EQ(begun[0], begun[1]);
}

TEST(WeightsExchange, ARankThatEndsEarlyHasDeliveredItsLastRecord) {
  expect_ranks({.ranks = 3}, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 0; step < 5; ++step) {
      rank.move();
      if (step == 4 && rank.rank == 2) {
        std::this_thread::sleep_for(std::chrono::seconds(1));  // the others are gone by now
      }
      rank.sync();
    }
  });
}

TEST(WeightsExchange, AResumeFromEveryRanksStateGoesOnWithTheSameReference) {
  std::array<ModuleState, 2> saved;
  const Setting setting{.options = {{"transport", "inproc"}}};
  expect_ranks(setting, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 0; step < 5; ++step) {
      rank.move();
      rank.sync();
    }
    rank.move();
    saved[static_cast<std::size_t>(rank.rank)] = rank.exchange->state(rank.views());
  });
  EXPECT_EQ(saved[0].reference, saved[1].reference);
  EXPECT_NE(saved[0].residual, saved[1].residual);
  std::array<std::uint64_t, 2> checksums{};
  expect_ranks(setting, [&](Rank& rank) {
    const auto& own = saved[static_cast<std::size_t>(rank.rank)];
    rank.exchange->load(own, rank.views());
    EXPECT_EQ(rank.weights[0][0], own.reference[0][0] + own.share * own.residual[0][0]);
    rank.exchange->begin(rank.views(), *rank.exact);
    EXPECT_EQ(rank.exchange->state(rank.views()).residual, own.residual);
    rank.sync();
    EXPECT_EQ(rank.exchange->exchanges(), 6U);
    rank.sync();
    checksums[static_cast<std::size_t>(rank.rank)] = rank.exchange->checksum();
  });
  EXPECT_EQ(checksums[0], checksums[1]);
}

TEST(WeightsExchange, AResumeFromAMeanAndAMoveGoesOnAsIfNeverInterrupted) {
  for (const std::string share : {"0.25", "1"}) {
    const Setting setting{.options = {{"transport", "inproc"}, {"share", share}}};
    std::array<ModuleState, 2> saved;
    std::array<std::vector<std::vector<float>>, 2> at_save;
    std::array<std::vector<std::vector<float>>, 2> at_end;
    const auto go_on = [](Rank& rank) {
      for (int step = 0; step < 20; ++step) {
        rank.sync();
        rank.move();
      }
    };
    expect_ranks(setting, [&](Rank& rank) {
      const auto own = static_cast<std::size_t>(rank.rank);
      rank.exchange->begin(rank.views(), *rank.exact);
      rank.move();
      rank.sync();
      rank.exchange->average(rank.views(), *rank.exact);
      rank.move();
      saved[own] = rank.exchange->state(rank.views());
      at_save[own] = rank.weights;
      go_on(rank);
      at_end[own] = rank.weights;
    });
    expect_ranks(setting, [&](Rank& rank) {
      const auto own = static_cast<std::size_t>(rank.rank);
      rank.move();
      rank.move();  // the random numbers of before
      rank.exchange->load(saved[own], rank.views());
      EXPECT_EQ(rank.weights, at_save[own]);
      rank.exchange->begin(rank.views(), *rank.exact);
      go_on(rank);
      EXPECT_EQ(rank.weights, at_end[own]);
    });
  }
}

TEST(WeightsExchange, AResumeOnOneRankOnlyIsAnErrorOnAll) {
  ModuleState saved;
  const Setting setting{.options = {{"transport", "inproc"}}};
  expect_ranks(setting, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    rank.sync();
    if (rank.rank == 1) {
      saved = rank.exchange->state(rank.views());
    }
  });
  const auto errors = run_ranks(setting, [&](Rank& rank) {
    if (rank.rank == 1) {
      rank.exchange->load(saved, rank.views());
    }
    rank.exchange->begin(rank.views(), *rank.exact);
  });
  for (const auto& error : errors) {
    EXPECT_NE(error.find("rank 0 at exchange 0, rank 1 at exchange 1"), std::string::npos) << error;
  }
}

TEST(WeightsExchange, TwoModulesOfAProcessExchangeInAnyOrder) {
  expect_ranks({.options = {{"transport", "inproc"}}}, [&](Rank& rank) {
    std::vector<float> second(5000, 1.0F);
    const std::array views = {
        plugins::TensorView{second.data(), kernels::DType::f32, second.size()}};
    WeightsExchange other(rank.group, {{"second", kernels::DType::f32, {5000}}});
    rank.exchange->begin(rank.views(), *rank.exact);
    other.begin(views, *rank.exact);
    for (int step = 0; step < 20; ++step) {
      rank.move();
      second[7] += 1.0F;
      // A rank may be a step ahead with one module while it waits for the other.
      if (rank.rank == 0) {
        rank.sync();
        other.sync(views, *rank.exact, 1.0F);
      } else {
        other.sync(views, *rank.exact, 1.0F);
        rank.sync();
      }
    }
    EXPECT_NE(rank.exchange->checksum(), other.checksum());
  });
}

TEST(WeightsExchange, RecordsOfAModuleThatIsGoneAreDroppedAndCounted) {
  expect_ranks({.options = {{"transport", "inproc"}}}, [&](Rank& rank) {
    std::vector<float> second(5000, 1.0F);
    const std::array views = {
        plugins::TensorView{second.data(), kernels::DType::f32, second.size()}};
    rank.exchange->begin(rank.views(), *rank.exact);
    {
      WeightsExchange fold(rank.group, {{"fold", kernels::DType::f32, {5000}}});
      fold.begin(views, *rank.exact);
      fold.sync(views, *rank.exact, 1.0F);
    }
    for (int step = 0; step < 3; ++step) {
      rank.sync();
    }
    EXPECT_EQ(rank.group->counters().orphaned_records, 1U);
  });
}

}  // namespace
}  // namespace distro::exchange::testing
