#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "gradient_ranks.h"
#include "plugins/gradient_layout.h"
#include "tests/seed.h"

namespace distro::plugins {
namespace {

using kernels::DType;

std::mt19937 printed_seed() {
  const auto seed = test::seed();
  fmt::print("seed {}\n", seed);
  return std::mt19937(seed);
}

GradientConfig with(GradientMethod method, std::uint32_t k, std::uint32_t value_bits,
                    Transform transform = Transform::dct) {
  return {method, k, value_bits, transform, 1.0F, kernels::best_isa()};
}

/// Largest relative error of one rounding.
double rounding(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::f64:  // the codec works in fp32
      return 0x1p-24;
    case DType::f16:
      return 0x1p-11;
    case DType::bf16:
      return 0x1p-8;
  }
  return 0.0;
}

class Everything : public testing::TestWithParam<Transform> {};

TEST_P(Everything, SentInFullIsTheDenseMean) {
  std::mt19937 random = printed_seed();
  const std::vector<GradientTensor> tensors = gradient_tensors();
  constexpr std::size_t kRanks = 3;
  constexpr float kWeights[kRanks] = {0.25F, 0.5F, 0.25F};
  std::vector<GradientRank> ranks;
  std::vector<EncodedGradients> encoded;
  for (std::size_t rank = 0; rank < kRanks; ++rank) {
    ranks.emplace_back(tensors, with(GradientMethod::ef, 4096, 32, GetParam()));
    ranks.back().draw(random);
    encoded.push_back(ranks.back().encode());
  }
  std::vector<ParsedRecord> parsed;
  std::vector<Contribution> contributions;
  for (std::size_t rank = 0; rank < kRanks; ++rank) {
    parsed.push_back(ranks[0].codec.parse(encoded[rank].record));
    for (const Residual& residual : ranks[rank].residuals) {
      for (const float left : residual.coefficients) {
        ASSERT_EQ(left, 0.0F);
      }
    }
  }
  for (std::size_t rank = 0; rank < kRanks; ++rank) {
    contributions.push_back({&parsed[rank], kWeights[rank]});
  }
  const Module out = decode(ranks[0].codec, ranks[0].gradients, contributions);
  for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
    // A transform spreads each coefficient's rounding over its block; besides, fp32 rounds each
    // addition, and the tensor's type the result.
    const double spread = (GetParam() == Transform::dct ? 32 : 1) * rounding(DType::f32);
    const double relative = rounding(tensors[tensor].dtype) + 4 * rounding(DType::f32);
    for (std::size_t i = 0; i < out.tensors()[tensor].elements; ++i) {
      double mean = 0.0;
      double magnitude = 0.0;
      for (std::size_t rank = 0; rank < kRanks; ++rank) {
        const double part =
            static_cast<double>(kWeights[rank]) * ranks[rank].gradients.get(tensor, i);
        mean += part;
        magnitude += std::abs(part);
      }
      ASSERT_NEAR(out.get(tensor, i), mean, relative * magnitude + spread)
          << "tensor " << tensor << " element " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Transforms, Everything, testing::Values(Transform::dct, Transform::none));

TEST(Gradient, KeepsTheLargestCoefficientsOfEachTile) {
  std::mt19937 random = printed_seed();
  const std::vector<GradientTensor> tensors = gradient_tensors();
  const GradientConfig config = with(GradientMethod::ef, 48, 32);
  GradientRank rank(tensors, config);
  rank.draw(random);
  (void)rank.encode();
  rank.draw(random);
  const std::vector<std::vector<float>> all = all_coefficients(tensors, config, rank);
  const EncodedGradients encoded = rank.encode();
  const GradientLayout layout(shapes_of(tensors));
  for (std::size_t t = 0; t < layout.tiles().size(); ++t) {
    const GradientTile& tile = layout.tiles()[t];
    std::vector<float> magnitudes;
    for (std::size_t i = 0; i < tile.elements; ++i) {
      magnitudes.push_back(std::abs(all[tile.tensor][tile.begin + i]));
    }
    std::sort(magnitudes.rbegin(), magnitudes.rend());
    const std::size_t kept = TileLayout::kept(48, tile.elements);
    const std::span<const float> values = encoded.own.values(t);
    ASSERT_EQ(values.size(), kept);
    std::vector<float> sent;
    for (std::size_t i = 0; i < kept; ++i) {
      ASSERT_EQ(values[i], all[tile.tensor][tile.begin + encoded.own.indices(t)[i]]);
      sent.push_back(std::abs(values[i]));
    }
    std::sort(sent.rbegin(), sent.rend());
    magnitudes.resize(kept);
    ASSERT_EQ(sent, magnitudes);
  }
}

class Feedback : public testing::TestWithParam<std::uint32_t> {};

TEST_P(Feedback, WhatWasSentAndWhatIsLeftAreAllThatCame) {
  std::mt19937 random = printed_seed();
  const std::vector<GradientTensor> tensors = gradient_tensors();
  const GradientConfig config = with(GradientMethod::ef, 48, GetParam());
  GradientRank rank(tensors, config);
  const GradientLayout layout(shapes_of(tensors));
  // By tensor and coefficient: what came less what was sent.
  std::vector<std::vector<double>> balance;
  for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
    balance.emplace_back(layout.tensor_elements(tensor));
  }
  for (int step = 0; step < 6; ++step) {
    rank.draw(random);
    GradientRank fresh(tensors, config);
    fresh.gradients = rank.gradients;
    const std::vector<std::vector<float>> came = all_coefficients(tensors, config, fresh);
    const EncodedGradients encoded = rank.encode();
    ASSERT_FALSE(encoded.own.index.empty());
    for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
      for (std::size_t i = 0; i < came[tensor].size(); ++i) {
        balance[tensor][i] += static_cast<double>(came[tensor][i]);
      }
    }
    for (std::size_t t = 0; t < layout.tiles().size(); ++t) {
      const GradientTile& tile = layout.tiles()[t];
      for (std::size_t i = encoded.own.first[t]; i < encoded.own.first[t + 1]; ++i) {
        balance[tile.tensor][tile.begin + encoded.own.index[i]] -=
            static_cast<double>(encoded.own.value[i]);
      }
    }
  }
  for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
    for (std::size_t i = 0; i < balance[tensor].size(); ++i) {
      ASSERT_NEAR(static_cast<double>(rank.residuals[tensor].coefficients[i]), balance[tensor][i],
                  1e-5);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(ValueBits, Feedback, testing::Values(1, 32));

TEST(Gradient, BetaDecaysTheResidualBeforeTheGradientIsAdded) {
  std::mt19937 random = printed_seed();
  const std::vector<GradientTensor> tensors{{{100, 90}, DType::f32}};
  GradientConfig config = with(GradientMethod::ef, 6, 1);
  config.beta = 0.5F;
  GradientRank rank(tensors, config);
  rank.draw(random);
  (void)rank.encode();
  const kernels::HugeVector<float> before = rank.residuals[0].coefficients;
  rank.draw(random, 0.0);
  const EncodedGradients encoded = rank.encode();
  kernels::HugeVector<float> expected = before;
  for (float& value : expected) {
    value *= 0.5F;
  }
  const std::vector<Residual*> residuals = rank.residual_pointers();
  rank.codec.take_back(encoded.own, std::vector<std::uint32_t>{0}, residuals);
  EXPECT_EQ(rank.residuals[0].coefficients, expected);
}

TEST(Gradient, DemoIsTheSignOfTheMeanOverTheSenders) {
  // Rank 0 sends coefficient a alone, rank 1 b alone, both send c: a and b count in full whatever
  // the weights, c as the weighted mean.
  const std::vector<GradientTensor> tensors{{{64, 64}, DType::f32}};
  const GradientConfig config = with(GradientMethod::demo, 2, 32);
  const GradientCodec codec(shapes_of(tensors), config);
  ParsedRecord first{{0, 2}, {5, 70}, {3.0F, 8.0F}};
  ParsedRecord second{{0, 2}, {70, 900}, {-4.0F, 2.5F}};
  const Module like({{4096, DType::f32}});
  const Module out = decode(codec, like, {{&first, 0.75F}, {&second, 0.25F}});

  const std::vector<std::uint16_t> index{5, 70, 900};
  const std::vector<float> coefficients{3.0F, 0.75F * 8.0F - 0.25F * 4.0F, 2.5F};
  std::vector<float> expected(4096);
  kernels::table(kernels::Isa::scalar)
      .inverse_dct(index.data(), coefficients.data(), index.size(), expected.data(), 64, 64);
  std::size_t differs_from_ef = 0;
  const GradientCodec ef(shapes_of(tensors), with(GradientMethod::ef, 2, 32));
  const Module mean = decode(ef, like, {{&first, 0.75F}, {&second, 0.25F}});
  for (std::size_t i = 0; i < 4096; ++i) {
    const float sign = expected[i] > 0.0F ? 1.0F : -1.0F;
    ASSERT_EQ(out.get(0, i), static_cast<double>(sign));
    differs_from_ef += out.get(0, i) * mean.get(0, i) < 0.0 ? 1U : 0U;
  }
  EXPECT_GT(differs_from_ef, 100U);
}

TEST(Gradient, DemoLeavesZeroWhereNothingIsDecoded) {
  const std::vector<GradientTensor> tensors{{{4, 2}, DType::bf16}, {{3}, DType::f64}};
  const GradientCodec codec(shapes_of(tensors),
                            with(GradientMethod::demo, 4096, 32, Transform::none));
  const ParsedRecord record{{0, 3, 3}, {0, 3, 6}, {-2.0F, 1e-38F, 5.0F}};
  const ParsedRecord opposite{{0, 1, 1}, {6}, {-5.0F}};
  const Module out = decode(codec, Module({{8, DType::bf16}, {3, DType::f64}}),
                            {{&record, 0.5F}, {&opposite, 0.5F}});
  const double expected[] = {-1, 0, 0, 1, 0, 0, 0, 0};
  for (std::size_t i = 0; i < 8; ++i) {
    EXPECT_EQ(out.get(0, i), expected[i]);
  }
  EXPECT_EQ(out.get(1, 2), 0.0);
}

TEST(Gradient, MisuseIsNamed) {
  const std::vector<GradientTensor> tensors{{{10, 7}, DType::f32}, {{3}, DType::f32}};
  const auto shapes = shapes_of(tensors);
  EXPECT_THROW(GradientCodec(shapes, {GradientMethod::ef, 0}), std::invalid_argument);
  EXPECT_THROW(GradientCodec(shapes, {GradientMethod::ef, 4097}), std::invalid_argument);
  EXPECT_THROW(GradientCodec(shapes, {GradientMethod::ef, 6, 8}), std::invalid_argument);
  for (const float beta : {-0.5F, 1.5F, std::nanf("")}) {
    EXPECT_THROW(GradientCodec(shapes, {GradientMethod::ef, 6, 1, Transform::dct, beta}),
                 std::invalid_argument);
  }
  GradientRank rank(tensors, with(GradientMethod::ef, 6, 1));
  EXPECT_EQ(rank.codec.tensors(), 2U);
  EXPECT_EQ(rank.codec.tensor_elements(0), 70U);
  std::vector<TensorView> views = rank.gradients.views();
  const std::vector<Residual*> residuals = rank.residual_pointers();
  std::mt19937 random(7);
  rank.draw(random);
  const EncodedGradients encoded = rank.encode();
  rank.residuals[1].coefficients.resize(2);
  EXPECT_THROW((void)rank.codec.encode(views, residuals), std::invalid_argument);
  EXPECT_THROW((void)rank.codec.encode(views, {}), std::invalid_argument);
  views[0].elements = 69;
  EXPECT_THROW((void)rank.codec.encode(views, residuals), std::invalid_argument);
  const ParsedRecord other;
  const Contribution wrong[] = {{&other, 1.0F}};
  EXPECT_THROW(rank.codec.decode(wrong, {}, rank.gradients.views()), std::invalid_argument);
  for (const std::vector<std::uint32_t>& bad : {std::vector<std::uint32_t>{2}, {1, 0}, {0, 0}}) {
    EXPECT_THROW(rank.codec.decode({}, bad, rank.gradients.views()), std::invalid_argument);
  }
  const std::uint32_t tensor[] = {1};
  EXPECT_THROW(rank.codec.take_back(encoded.own, tensor, residuals), std::invalid_argument);
  OwnRecord forgot = encoded.own;
  forgot.before.pop_back();
  rank.residuals[1].coefficients.resize(3);
  EXPECT_NO_THROW(rank.codec.take_back(encoded.own, tensor, residuals));
  EXPECT_THROW(rank.codec.take_back(forgot, tensor, residuals), std::invalid_argument);
}

}  // namespace
}  // namespace distro::plugins
