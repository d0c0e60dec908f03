#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <thread>

#include "backend/exchange/envelope.h"
#include "tests/backend/exchange/ranks.h"

namespace distro::exchange {

/// A memory fault: weights of W change behind the codec's back.
struct WeightsExchangeTestAccess {
  static void damage(WeightsExchange& exchange) {
    auto& codec = dynamic_cast<plugins::WeightsCodec&>(*exchange.codec_);
    const auto reference = codec.reference(0);
    const auto residual = codec.residual(0);
    std::vector<float> damaged(reference.begin(), reference.end());
    for (auto& weight : damaged) {
      weight += 1e-3F;
    }
    codec.restore_state(0, damaged, std::vector<float>(residual.begin(), residual.end()), {});
  }
};

namespace testing {
namespace {

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Every rank's error has all of these parts.
void expect_all(const std::vector<std::string>& errors, const std::vector<std::string>& parts) {
  for (std::size_t rank = 0; rank < errors.size(); ++rank) {
    for (const auto& part : parts) {
      EXPECT_TRUE(contains(errors[rank], part)) << "rank " << rank << " says: " << errors[rank];
    }
  }
}

// What the ranks say when this element of tensor4 on rank 1 becomes `bad` before exchange 3.
std::vector<std::string> errors_of(int ranks, const StringMap& options, std::size_t element,
                                   float bad) {
  return run_ranks({.ranks = ranks, .options = options}, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 1; step <= 12; ++step) {
      rank.move();
      if (step == 3 && rank.rank == 1) {
        rank.weights[4][element] = bad;
      }
      rank.sync();
    }
  });
}

TEST(Fault, ANonFiniteWeightIsAnErrorOnAllRanksThatNamesRankParameterAndExchange) {
  for (const std::string delay : {"0", "1"}) {
    const auto errors = errors_of(3, {{"transport", "inproc"}, {"delay", delay}, {"turns", "1"}},
                                  4999, std::numeric_limits<float>::quiet_NaN());
    expect_all(errors, {"rank 1", "non-finite weight", "tensor4", "exchange 3"});
  }
}

TEST(Fault, ANonFiniteWeightIsFoundAtItsTurnAndIsNotSentBefore) {
  // Elements 16 to 31 have turn 1, which comes again with exchange 9.
  const auto errors = errors_of(2, {{"transport", "inproc"}, {"turns", "8"}}, 20,
                                std::numeric_limits<float>::infinity());
  expect_all(errors, {"rank 1", "non-finite weight", "tensor4", "exchange 9"});
}

TEST(Fault, ANonFiniteFirstWeightIsAnErrorOnAllRanks) {
  const auto errors = run_ranks({.options = {{"transport", "inproc"}}}, [&](Rank& rank) {
    if (rank.rank == 0) {
      rank.weights[2][0] = std::numeric_limits<float>::infinity();
    }
    rank.exchange->begin(rank.views(), *rank.exact);
  });
  expect_all(errors, {"rank 0", "non-finite weight", "tensor2"});
}

TEST(Fault, ANonFiniteWeightInAverageIsAnErrorOnAllRanksAndStaysOne) {
  const auto errors = run_ranks({.options = {{"transport", "inproc"}}}, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    rank.sync();
    if (rank.rank == 1) {
      rank.weights[0][5] = std::numeric_limits<float>::infinity();
    }
    EXPECT_THROW(rank.exchange->average(rank.views(), *rank.exact), std::runtime_error);
    rank.weights[0][5] = 0.0F;
    rank.sync();  // a module that has failed does not go on
  });
  expect_all(errors, {"rank 1", "non-finite weight", "tensor0"});
}

TEST(Fault, ADriftedReferenceIsFoundAtTheNextExchange) {
  const auto errors =
      run_ranks({.ranks = 3, .options = {{"transport", "inproc"}}}, [&](Rank& rank) {
        rank.exchange->begin(rank.views(), *rank.exact);
        for (int step = 1; step <= 6; ++step) {
          rank.move();
          if (step == 4 && rank.rank == 2) {
            WeightsExchangeTestAccess::damage(*rank.exchange);
          }
          rank.sync();
        }
      });
  expect_all(errors, {"drifted apart", "rank 2 of 3"});
}

TEST(Fault, DifferentModulesAreAnErrorOnAllRanksThatNamesTheParameter) {
  const auto errors =
      run_ranks({.ranks = 3, .options = {{"transport", "inproc"}}}, [&](Rank& rank) {
        std::vector<float> tensor(100 + static_cast<std::size_t>(rank.rank == 1));
        const std::vector<plugins::TensorView> views = {
            {tensor.data(), kernels::DType::f32, tensor.size()}};
        WeightsExchange other(
            rank.group,
            {{"head.weight", kernels::DType::f32, {static_cast<std::int64_t>(tensor.size())}}});
        other.begin(views, *rank.exact);
      });
  expect_all(errors, {"not the same on all ranks", "head.weight", "[100]", "rank 1", "[101]"});
}

TEST(Fault, DifferentModulesAreNamedThoughARankIsLostBeforeAllHaveHeard) {
  const auto errors =
      run_ranks({.ranks = 3, .options = {{"transport", "inproc"}}}, [&](Rank& rank) {
        if (rank.rank == 1) {
          const std::array<std::byte, sizeof(std::uint64_t)> nothing_yet{};
          rank.group->broadcast(
              seal({.kind = MessageKind::begin, .module = 0, .origin = 1, .geometry = 4711},
                   nothing_yet));
          for (const int peer : {0, 2}) {
            rank.group->take(peer, {0, MessageKind::begin, 0}, rank.group->deadline());
            rank.group->take(peer, {0, MessageKind::describe, 0}, rank.group->deadline());
          }
          rank.group->leave("rank 1 is lost");
          return;
        }
        rank.exchange->begin(rank.views(), *rank.exact);
      });
  EXPECT_EQ(errors[1], "");
  for (const auto& error : {errors[0], errors[2]}) {
    EXPECT_TRUE(contains(error, "module 0 is not the same on all ranks: rank 1 has not")) << error;
  }
}

TEST(Fault, DifferentGainsAreAnErrorOnAllRanks) {
  const auto errors = run_ranks({.options = {{"transport", "inproc"}}}, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 0; step < 3; ++step) {
      rank.exchange->sync(rank.views(), *rank.exact, rank.rank == 0 ? 1.0F : 2.0F);
    }
  });
  expect_all(errors, {"different gains", "rank 0 uses 1", "rank 1 uses 2", "DISTRO_GAIN"});
}

TEST(Fault, AverageAtDifferentStepsIsAnErrorAtOnce) {
  const auto errors = run_ranks({.ranks = 2}, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 0; step < 4; ++step) {
      if (rank.rank == 1 && step == 2) {
        rank.exchange->average(rank.views(), *rank.exact);
      }
      rank.sync();
    }
  });
  expect_all(errors, {"same order", "average() (after exchange 2)"});
}

TEST(Fault, ALateRankIsAnErrorThatNamesItWithinTheTimeOut) {
  const auto errors = run_ranks({.ranks = 3,
                                 .options = {{"transport", "inproc"}},
                                 .timeout = std::chrono::milliseconds(1500)},
                                [&](Rank& rank) {
                                  rank.exchange->begin(rank.views(), *rank.exact);
                                  rank.sync();
                                  if (rank.rank == 1) {
                                    std::this_thread::sleep_for(std::chrono::milliseconds(4000));
                                  }
                                  rank.sync();
                                  rank.sync();
                                });
  EXPECT_TRUE(contains(errors[0], "rank 1")) << errors[0];
  EXPECT_TRUE(contains(errors[2], "rank 1")) << errors[2];
}

TEST(Fault, ARankThatLeavesInTheMiddleIsNamed) {
  const auto errors = run_ranks({.ranks = 3}, [&](Rank& rank) {
    rank.exchange->begin(rank.views(), *rank.exact);
    for (int step = 0; step < 6; ++step) {
      if (rank.rank == 0 && step == 3) {
        return;
      }
      rank.sync();
    }
  });
  EXPECT_EQ(errors[0], "");
  EXPECT_TRUE(contains(errors[1], "rank 0")) << errors[1];
  EXPECT_TRUE(contains(errors[2], "rank 0")) << errors[2];
}

}  // namespace
}  // namespace testing
}  // namespace distro::exchange
