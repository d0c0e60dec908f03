#include "backend/exchange/reductions.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <future>
#include <limits>
#include <numeric>

#include "backend/exchange/reduction_message.h"
#include "tests/backend/exchange/ranks.h"

namespace distro::exchange::testing {
namespace {

constexpr std::size_t kElements = 5000;

Setting setting(int ranks, StringMap options = {}) {
  options.insert({{"mode", "ef"}, {"k", "4096"}, {"value_bits", "32"}, {"transport", "inproc"}});
  return {.ranks = ranks, .options = std::move(options), .shapes = {}};
}

// A tensor of a rank's gradients and all that belongs to it.
struct Gradient {
  explicit Gradient(std::size_t elements = kElements, float value = 0.0F)
      : values(elements, value) {}

  std::vector<float> values;
  std::vector<float> slice;  // of a reduce-scatter: this rank's part of the result
  std::vector<std::shared_ptr<plugins::Residual>> residuals;
  std::promise<void> promise;
  std::future<void> done = promise.get_future();
  std::atomic<bool> ran_exactly{false};
};

plugins::TensorView view(std::vector<float>& values, std::size_t begin, std::size_t count) {
  return {values.data() + begin, kernels::DType::f32, count};
}

// The sum of one tensor over all ranks.
Reduction sum_of(Gradient& gradient, bool exact = false) {
  Reduction reduction;
  reduction.what = "all-reduce SUM";
  reduction.exact = exact;
  const auto elements = gradient.values.size();
  reduction.tensors = {{"flat", kernels::DType::f32, {static_cast<std::int64_t>(elements)}}};
  reduction.input = reduction.output = {view(gradient.values, 0, elements)};
  if (gradient.residuals.empty()) {
    gradient.residuals = {std::make_shared<plugins::Residual>()};
  }
  reduction.residuals = [&](std::uint32_t) { return gradient.residuals; };
  reduction.run_exact = [&] {
    gradient.ran_exactly = true;
    gradient.promise.set_value();
  };
  reduction.complete = [&](const std::exception_ptr& error) {
    if (error) {
      gradient.promise.set_exception(error);
    } else {
      gradient.promise.set_value();
    }
  };
  return reduction;
}

Reduction scatter_of(Gradient& gradient, int ranks) {
  auto reduction = sum_of(gradient);
  reduction.what = "reduce-scatter SUM";
  reduction.scatter = true;
  const auto count = gradient.values.size() / static_cast<std::size_t>(ranks);
  reduction.tensors = {{"flat", kernels::DType::f32, {static_cast<std::int64_t>(count)}}};
  reduction.input.clear();
  gradient.residuals.clear();
  for (int rank = 0; rank < ranks; ++rank) {
    reduction.input.push_back(view(gradient.values, static_cast<std::size_t>(rank) * count, count));
    gradient.residuals.push_back(std::make_shared<plugins::Residual>());
  }
  gradient.slice.resize(count);
  reduction.output = {view(gradient.slice, 0, count)};
  return reduction;
}

void expect_near(const std::vector<float>& values, float expected) {
  for (const float value : values) {
    ASSERT_NEAR(value, expected, 1e-4F * (1.0F + std::abs(expected)));
  }
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void expect_all(const std::vector<std::string>& errors, const std::vector<std::string>& parts) {
  for (std::size_t rank = 0; rank < errors.size(); ++rank) {
    for (const auto& part : parts) {
      EXPECT_TRUE(contains(errors[rank], part)) << "rank " << rank << " says: " << errors[rank];
    }
  }
}

TEST(Reductions, ManyInFlightAreDecodedInOrderWithTheSameResultOnAllRanks) {
  std::vector<std::uint64_t> checksums(3);
  expect_ranks(setting(3), [&](Rank& rank) {
    std::vector<std::unique_ptr<Gradient>> gradients;
    for (std::size_t i = 0; i < 100; ++i) {  // more than may be open at once
      auto& gradient = *gradients.emplace_back(
          std::make_unique<Gradient>(kElements + i, static_cast<float>(i) + 0.5F));
      rank.group->reductions()->submit(sum_of(gradient));
    }
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      gradients[i]->done.get();
      expect_near(gradients[i]->values, 3.0F * (static_cast<float>(i) + 0.5F));
    }
    EXPECT_EQ(rank.group->counters().reductions, 100U);
    checksums[static_cast<std::size_t>(rank.rank)] = rank.group->counters().reference_checksum;
  });
  EXPECT_NE(checksums[0], 0U);
  EXPECT_EQ(checksums[0], checksums[1]);
  EXPECT_EQ(checksums[0], checksums[2]);
}

TEST(Reductions, OneResidualUsedTwiceIsNotOpenTwice) {
  expect_ranks(setting(2, {{"k", "1024"}, {"transform", "none"}}), [&](Rank& rank) {
    Gradient first(4096, 1.0F);
    Gradient second(4096, rank.rank == 0 ? std::numeric_limits<float>::infinity() : 1.0F);
    Gradient third(4096, 0.0F);
    first.residuals = {std::make_shared<plugins::Residual>()};
    second.residuals = third.residuals = first.residuals;
    for (auto* gradient : {&first, &second, &third}) {
      rank.group->reductions()->submit(sum_of(*gradient));
    }
    third.done.get();
    EXPECT_EQ(std::accumulate(first.values.begin(), first.values.end(), 0.0F), 2 * 1024.0F);
    EXPECT_TRUE(std::isnan(second.values[0]));
    // The void step has left rank 0's residual alone, and what rank 1 sent for it is back in its
    // own.
    EXPECT_EQ(std::accumulate(third.values.begin(), third.values.end(), 0.0F), 3 * 1024.0F);
    EXPECT_EQ(rank.rank == 0 ? 4096.0F - 2048.0F : 8192.0F - 1024.0F - 2048.0F,
              std::accumulate(first.residuals[0]->coefficients.begin(),
                              first.residuals[0]->coefficients.end(), 0.0F));
  });
}

TEST(Reductions, ExactOnAllRanksRunsExactlyAndOnSomeIsCompressedOnAll) {
  expect_ranks(setting(3), [&](Rank& rank) {
    for (int gradient_ranks = 0; gradient_ranks <= 3; ++gradient_ranks) {
      Gradient gradient(kElements, 1.0F + static_cast<float>(rank.rank));
      rank.group->reductions()->submit(sum_of(gradient, rank.rank >= gradient_ranks));
      gradient.done.get();
      EXPECT_EQ(gradient.ran_exactly, gradient_ranks == 0);
      expect_near(gradient.values,
                  gradient_ranks == 0 ? 1.0F + static_cast<float>(rank.rank) : 6.0F);
    }
  });
}

TEST(Reductions, AReduceScatterSendsEachRankItsSliceOnly) {
  std::vector<std::uint64_t> sent(3);
  expect_ranks(setting(3), [&](Rank& rank) {
    Gradient whole(3 * kElements, 1.0F);
    for (std::size_t i = 0; i < whole.values.size(); ++i) {
      whole.values[i] = static_cast<float>(i / kElements) + 1.0F;
    }
    if (rank.rank == 1) {
      whole.values[2 * kElements] = std::numeric_limits<float>::quiet_NaN();  // in rank 2's
    }
    rank.group->reductions()->submit(scatter_of(whole, 3));
    whole.done.get();
    if (rank.rank == 2) {
      EXPECT_TRUE(std::isnan(whole.slice[0]));
    } else {
      expect_near(whole.slice, 3.0F * (1.0F + static_cast<float>(rank.rank)));
    }
    // What was sent in vain to the slice that is void is in its residual again.
    const auto& left = whole.residuals[2]->coefficients;
    EXPECT_EQ(std::ranges::any_of(left, [](float v) { return v != 0.0F; }), rank.rank != 1);
    sent[static_cast<std::size_t>(rank.rank)] = rank.group->counters().payload_bytes_sent;
  });
  EXPECT_LT(sent[0], 2 * 2 * kElements * sizeof(float));  // two slices, not two whole tensors
}

TEST(Reductions, ANonFiniteGradientIsSeenByAllAndPoisonsNobody) {
  expect_ranks(setting(2), [&](Rank& rank) {
    Gradient gradient(kElements, 1.0F);
    gradient.values[7] = rank.rank == 1 ? std::numeric_limits<float>::quiet_NaN() : 1.0F;
    const auto kept = gradient.residuals = {std::make_shared<plugins::Residual>()};
    rank.group->reductions()->submit(sum_of(gradient));
    gradient.done.get();
    EXPECT_TRUE(std::ranges::all_of(gradient.values, [](float v) { return std::isnan(v); }));
    Gradient next(kElements, 1.0F);
    next.residuals = kept;
    rank.group->reductions()->submit(sum_of(next));
    next.done.get();
    // Rank 0's gradient of the void step was not lost: 1 + 1 from it, 1 from rank 1.
    expect_near(next.values, 3.0F);
  });
}

TEST(Reductions, DifferentReductionsAreAnErrorOnAllRanksThatNamesThem) {
  const auto errors = run_ranks(setting(3), [&](Rank& rank) {
    Gradient gradient(kElements + (rank.rank == 2 ? 1 : 0));
    Gradient later;
    rank.group->reductions()->submit(sum_of(gradient, rank.rank == 0));
    rank.group->reductions()->submit(sum_of(later));
    EXPECT_THROW(later.done.get(), ExchangeError);  // what is queued behind it fails as well
    gradient.done.get();
  });
  expect_all(errors, {"gradient reduction 1", "where rank 0 has flat float32 [5000]",
                      "rank 2 has flat float32 [5001]"});
}

// Rank 1 says that it reduces something else and is lost before it says what.
TEST(Reductions, ADifferenceIsNamedThoughARankIsLostBeforeAllHaveHeard) {
  for (const bool describes : {false, true}) {
    const auto errors = run_ranks(setting(3), [&](Rank& rank) {
      if (rank.rank == 1) {
        rank.group->broadcast(seal_reduction({.exact = true}, 1, kReductions, 1, 4711));
        if (describes) {
          const std::string text = "all-reduce of something else\n";
          rank.group->send(
              0, seal({.kind = MessageKind::describe, .module = kReductionAnswers, .origin = 1},
                      std::as_bytes(std::span(text))));
        }
        for (const int peer : {0, 2}) {
          rank.group->take(peer, {kReductionAnswers, MessageKind::describe, 0},
                           rank.group->deadline());
        }
        rank.group->leave("rank 1 is lost");
        return;
      }
      Gradient gradient;
      rank.group->reductions()->submit(sum_of(gradient));
      gradient.done.get();
    });
    EXPECT_EQ(errors[1], "");
    const std::string unknown = "rank 1 has not what rank";
    EXPECT_TRUE(
        contains(errors[0], describes ? "rank 1 has all-reduce of something else" : unknown))
        << errors[0];
    EXPECT_TRUE(contains(errors[2], unknown)) << errors[2];
    for (const int survivor : {0, 2}) {
      const auto& error = errors[static_cast<std::size_t>(survivor)];
      EXPECT_TRUE(contains(error, "gradient reduction 1 is not the same on all ranks")) << error;
    }
  }
}

TEST(Reductions, AMalformedRecordIsAnErrorOnAllRanksThatNamesItsSender) {
  const auto errors = run_ranks(setting(3), [&](Rank& rank) {
    if (rank.rank == 1) {
      // A rank that does not use the engine: it says what the others say, and sends garbage.
      const auto said =
          rank.group->take(0, {kReductions, MessageKind::reduction, 1}, rank.group->deadline());
      const std::vector<std::byte> garbage(100, std::byte{0xff});
      rank.group->broadcast(
          seal_reduction({.record = garbage}, 1, kReductions, 1, said.opened.envelope.geometry));
      rank.group->take(0, {kReductions, MessageKind::reduction, 2}, rank.group->deadline());
      return;
    }
    Gradient gradient;
    rank.group->reductions()->submit(sum_of(gradient));
    gradient.done.get();
  });
  expect_all(errors, {"malformed record", "rank 1"});
}

TEST(Reductions, ARankThatDoesNotComeIsNamedAtTheTimeOut) {
  auto late = setting(3);
  late.timeout = std::chrono::milliseconds(500);
  const auto errors = run_ranks(late, [&](Rank& rank) {
    if (rank.rank == 1) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1300));
      return;
    }
    Gradient gradient;
    rank.group->reductions()->submit(sum_of(gradient));
    gradient.done.get();
  });
  for (const int rank : {0, 2}) {
    EXPECT_TRUE(contains(errors[static_cast<std::size_t>(rank)], "rank 1")) << errors[0];
  }
}

TEST(Reductions, AClosedEngineFinishesWhatIsInFlightAndRefusesTheRest) {
  expect_ranks(setting(2), [&](Rank& rank) {
    std::vector<std::unique_ptr<Gradient>> gradients;
    for (int i = 0; i < 10; ++i) {
      gradients.push_back(std::make_unique<Gradient>(kElements, 1.0F));
      rank.group->reductions()->submit(sum_of(*gradients.back()));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(100 * rank.rank));
    rank.group->close();
    for (const auto& gradient : gradients) {
      gradient->done.get();
      expect_near(gradient->values, 2.0F);
    }
    Gradient late;
    rank.group->reductions()->submit(sum_of(late));
    EXPECT_THROW(late.done.get(), ExchangeError);
  });
}

}  // namespace
}  // namespace distro::exchange::testing
