#include <fmt/format.h>
#include <gtest/gtest.h>
#include <tbb/task_arena.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "gradient_ranks.h"
#include "plugins/gradient_layout.h"

/// What must hold on every machine, for every thread count, and whatever a script does.
namespace distro::plugins {
namespace {

using kernels::DType;
using kernels::Isa;

bool same_bits(const Residual& a, const Residual& b) {
  return std::equal(a.coefficients.begin(), a.coefficients.end(), b.coefficients.begin(),
                    b.coefficients.end(), [](float x, float y) {
                      return std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(y);
                    });
}

struct Outcome {
  std::vector<std::vector<std::byte>> records;
  std::vector<std::vector<std::byte>> decoded;
  bool operator==(const Outcome&) const = default;
};

/// Two steps of two ranks, the same gradients each time.
Outcome outcome(GradientMethod method, Isa isa, int threads) {
  tbb::task_arena arena(threads);
  const std::vector<GradientTensor> tensors = gradient_tensors();
  std::vector<GradientRank> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    ranks.emplace_back(tensors, GradientConfig{method, 48, 1, Transform::dct, 0.9F, isa});
  }
  std::mt19937 random(3);
  Outcome outcome;
  for (int step = 0; step < 2; ++step) {
    std::vector<ParsedRecord> parsed;
    for (GradientRank& rank : ranks) {
      rank.draw(random);
      outcome.records.push_back(arena.execute([&] { return rank.encode().record; }));
      parsed.push_back(arena.execute([&] { return rank.codec.parse(outcome.records.back()); }));
    }
    const std::vector<Contribution> contributions = equal_weights(parsed);
    const Module out =
        arena.execute([&] { return decode(ranks[0].codec, ranks[0].gradients, contributions); });
    outcome.decoded.insert(outcome.decoded.end(), out.bytes().begin(), out.bytes().end());
  }
  return outcome;
}

TEST(GradientSafety, InstructionSetsAndThreadsChangeNoBit) {
  for (const GradientMethod method : {GradientMethod::ef, GradientMethod::demo}) {
    const Outcome expected = outcome(method, Isa::scalar, 1);
    EXPECT_EQ(outcome(method, Isa::avx2, 1), expected);
    EXPECT_EQ(outcome(method, Isa::avx512, 3), expected);
  }
}

TEST(GradientSafety, ANonFiniteGradientIsNamedSentByNobodyAndPoisonsNothing) {
  const std::vector<GradientTensor> tensors = gradient_tensors();
  GradientRank rank(tensors, {GradientMethod::ef, 48, 1});
  std::mt19937 random(4);
  rank.draw(random);
  (void)rank.encode();
  const std::vector<Residual> before = rank.residuals;
  rank.draw(random);
  rank.gradients.set(0, 128 * 192 - 1, std::numeric_limits<double>::infinity());
  rank.gradients.set(1, 70, std::nan(""));
  rank.gradients.set(2, 767, 7e4);      // f16 has no such number
  rank.gradients.set(5, 9000, 1e300);   // nor has f32
  rank.gradients.set(11, 4, -0x1p100);  // whose sums could overflow
  const EncodedGradients encoded = rank.encode();
  const std::vector<std::uint32_t> bad{0, 1, 2, 5, 11};
  EXPECT_EQ(encoded.non_finite, bad);
  const GradientLayout layout(shapes_of(tensors));
  for (std::size_t t = 0; t < layout.tiles().size(); ++t) {
    const auto tensor = static_cast<std::uint32_t>(layout.tiles()[t].tensor);
    const bool is_bad = std::binary_search(bad.begin(), bad.end(), tensor);
    EXPECT_EQ(encoded.own.values(t).empty(), is_bad);
  }
  for (const std::uint32_t tensor : bad) {
    EXPECT_TRUE(same_bits(rank.residuals[tensor], before[tensor]));
  }

  const std::vector<Contribution> alone{{&encoded.own, 1.0F}};
  const Module out = decode(rank.codec, rank.gradients, alone, {0, 3, 5, 9, 10});
  for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
    const bool nan = tensor == 0 || tensor == 3 || tensor == 5 || tensor == 9 || tensor == 10;
    for (std::size_t i = 0; i < out.tensors()[tensor].elements; ++i) {
      ASSERT_EQ(std::isnan(out.get(tensor, i)), nan);
    }
  }
}

TEST(GradientSafety, TakingBackLeavesTheResidualAsIfNothingHadBeenSent) {
  const std::vector<GradientTensor> tensors = gradient_tensors();
  const GradientConfig config{GradientMethod::ef, 300, 1};
  GradientRank rank(tensors, config);
  std::mt19937 random(5);
  for (int step = 0; step < 3; ++step) {
    rank.draw(random);
    // Tiles of one run with unlike values: entries far below the shared scale, too, which adding
    // the scale again would not bring back.
    for (std::size_t i = 64 * 192; i < 128 * 192; ++i) {
      rank.gradients.set(0, i, rank.gradients.get(0, i) * 1e-4);
    }
    const std::vector<std::vector<float>> full = all_coefficients(tensors, config, rank);
    const EncodedGradients encoded = rank.encode();
    const std::vector<Residual> sent = rank.residuals;
    const std::vector<std::uint32_t> bad{0, 6, 7};
    rank.codec.take_back(encoded.own, bad, rank.residual_pointers());
    for (std::uint32_t tensor = 0; tensor < tensors.size(); ++tensor) {
      if (std::binary_search(bad.begin(), bad.end(), tensor)) {
        EXPECT_FALSE(same_bits(rank.residuals[tensor], sent[tensor]));
        EXPECT_TRUE(std::ranges::equal(rank.residuals[tensor].coefficients, full[tensor]));
      } else {
        EXPECT_TRUE(same_bits(rank.residuals[tensor], sent[tensor]));
      }
    }
    std::size_t rounded = 0;
    for (std::size_t i = 0; i < encoded.own.value.size(); ++i) {
      const float before = encoded.own.before[i];
      const float q = encoded.own.value[i];
      rounded += (before - q) + q != before ? 1U : 0U;
    }
    EXPECT_GT(rounded, 0U);
  }
}

TEST(GradientSafety, NothingToReduceIsNoError) {
  const std::vector<GradientTensor> tensors{{{0, 5}, DType::f32}};
  GradientRank rank(tensors, {});
  const std::vector<TensorView> views{{nullptr, DType::f32, 0}};
  const EncodedGradients encoded = rank.codec.encode(views, rank.residual_pointers());
  EXPECT_TRUE(encoded.record.empty());
  EXPECT_TRUE(encoded.non_finite.empty());
  const std::vector<Contribution> alone{{&encoded.own, 1.0F}};
  EXPECT_NO_THROW(rank.codec.decode(alone, {}, views));
  EXPECT_EQ(rank.codec.parse({}).first.size(), 1U);
}

#if defined(__SSE2__)
TEST(GradientSafety, FlushingSubnormalsInTheScriptChangesNoBit) {
  const auto run = [](unsigned mode) {
    GradientRank rank({{{70, 70}, DType::f32}}, {GradientMethod::ef, 4096, 32});
    std::mt19937 random(6);
    rank.draw(random, 1e-38);
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | mode);
    const EncodedGradients encoded = rank.encode();
    const Module out = decode(rank.codec, rank.gradients, {{&encoded.own, 1.0F}});
    EXPECT_EQ(_mm_getcsr() & 0x8040U, mode);
    _mm_setcsr(before);
    return std::pair(encoded.record, out.bytes());
  };
  EXPECT_EQ(run(0x8040), run(0));  // FTZ and DAZ
}
#endif

}  // namespace
}  // namespace distro::plugins
