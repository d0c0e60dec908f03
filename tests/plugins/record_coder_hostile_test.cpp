#include <fmt/format.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <string>

#include "gradient_ranks.h"
#include "plugins/geometry.h"
#include "plugins/gradient_layout.h"
#include "plugins/record_coder.h"
#include "simulation.h"
#include "tests/seed.h"

namespace distro::plugins {
namespace {

constexpr std::size_t kLengthBytes = 4;

/// Everything that a parsed record promises.
void expect_valid(const TileLayout& layout, std::uint32_t k, const ParsedRecord& record) {
  ASSERT_EQ(record.first.size(), layout.tiles() + 1);
  ASSERT_EQ(record.first.front(), 0U);
  ASSERT_EQ(record.first.back(), record.index.size());
  ASSERT_EQ(record.index.size(), record.value.size());
  for (std::size_t t = 0; t < layout.tiles(); ++t) {
    const std::size_t n = layout.tile_size(t);
    ASSERT_LE(record.first[t], record.first[t + 1]);
    ASSERT_LE(record.first[t + 1] - record.first[t], TileLayout::kept(k, n));
    for (std::size_t i = record.first[t]; i < record.first[t + 1]; ++i) {
      ASSERT_LT(record.index[i], n);
      ASSERT_TRUE(i == record.first[t] || record.index[i - 1] < record.index[i]);
      ASSERT_TRUE(std::isfinite(record.value[i]));
      ASSERT_NE(record.value[i], 0.0F);
    }
  }
}

std::vector<std::byte> mutate(std::vector<std::byte> body, std::mt19937& random) {
  const auto any = [&] { return static_cast<std::byte>(random()); };
  switch (random() % 6) {
    case 0:
      body[random() % body.size()] = any();
      break;
    case 1:
      body[random() % body.size()] ^= std::byte{1} << (random() % 8);
      break;
    case 2:
      body.resize(random() % body.size());
      break;
    case 3:
      body.resize(body.size() + 1 + random() % 9, any());
      break;
    case 4: {  // a length that lies
      const auto lie = static_cast<std::uint32_t>(random() >> (random() % 32));
      std::memcpy(body.data(), &lie, std::min(sizeof(lie), body.size()));
      break;
    }
    default:
      for (std::size_t i = random() % body.size(); i < body.size() && random() % 50 != 0; ++i) {
        body[i] = any();
      }
  }
  return body;
}

std::mt19937 printed_seed() {
  const auto seed = test::seed();
  fmt::print("seed {}\n", seed);
  testing::Test::RecordProperty("seed", fmt::format("{}", seed));
  return std::mt19937(seed);
}

/// Mutates the body again and again: each is refused, or valid, and then `use` gets it.
void expect_refused_or_valid(const TileLayout& layout, std::uint32_t k,
                             const std::vector<std::byte>& body, std::mt19937& random,
                             const auto& parse, const auto& use) {
  int refused = 0;
  for (int round = 0; round < 200; ++round) {
    const std::vector<std::byte> mutated = mutate(body, random);
    try {
      const ParsedRecord record = parse(mutated);
      expect_valid(layout, k, record);
      use(record);
    } catch (const RecordError& error) {
      ++refused;
      EXPECT_NE(std::string(error.what()).find("record"), std::string::npos) << error.what();
    }
  }
  EXPECT_GT(refused, 20);
}

TEST(HostileRecord, MutationsAreRefusedOrValid) {
  std::mt19937 random = printed_seed();
  for (const WeightsConfig config : {WeightsConfig{6, 1}, WeightsConfig{6, 32},
                                     WeightsConfig{300, 1}, WeightsConfig{4096, 32}}) {
    Simulation simulation(mixed_tensors(), config, {.ranks = 1});
    simulation.step(0.1);
    const WeightsCodec& codec = simulation.codecs[0];
    expect_refused_or_valid(
        codec.geometry().layout(0), config.k, simulation.last[0].record, random,
        [&](const auto& body) { return codec.parse(body, 0); }, [](const ParsedRecord&) {});
  }
}

TEST(HostileRecord, MutationsOfGradientsAreRefusedOrDecoded) {
  std::mt19937 random = printed_seed();
  const std::vector<GradientTensor> tensors = gradient_tensors();
  const GradientLayout layout(shapes_of(tensors));
  for (const GradientConfig& config :
       {GradientConfig{GradientMethod::ef, 6, 1}, GradientConfig{GradientMethod::demo, 300, 32}}) {
    GradientRank rank(tensors, config);
    rank.draw(random);
    int decoded = 0;
    expect_refused_or_valid(
        layout.layout(), config.k, rank.encode().record, random,
        [&](const auto& body) { return rank.codec.parse(body); },
        [&](const ParsedRecord& record) {
          if (++decoded <= 10) {
            (void)decode(rank.codec, rank.gradients, {{&record, 1.0F}});
          }
        });
  }
}

/// One run of one tile of 100 elements, K = 4096 / 10 entries (10 of 100), written by hand.
class HandWritten : public testing::Test {
 protected:
  static constexpr std::uint32_t kTen = 409;

  std::string refusal(std::uint32_t value_bits, const std::function<void(kernels::BitWriter&)>& put,
                      std::size_t more_bytes = 0) const {
    std::vector<std::byte> section(200);
    kernels::BitWriter writer(section);
    put(writer);
    section.resize(writer.finish() + more_bytes);
    std::vector<std::byte> body(kLengthBytes);
    const auto length = static_cast<std::uint32_t>(section.size());
    std::memcpy(body.data(), &length, kLengthBytes);
    body.insert(body.end(), section.begin(), section.end());
    try {
      expect_valid(geometry_.layout(0), kTen,
                   RecordCoder(geometry_.layout(0), {kTen, value_bits}).parse(body));
    } catch (const RecordError& error) {
      return error.what();
    }
    return "accepted";
  }

  static void put_entry(kernels::BitWriter& writer, std::uint16_t index) {
    writer.put(0, 1);
    writer.put(1, 4);
    const std::uint16_t indices[] = {index};
    writer.write_gaps(indices, 100);
  }

  Geometry geometry_{std::vector<std::size_t>{100}};
};

TEST_F(HandWritten, AGoodOneIsAccepted) {
  EXPECT_EQ(refusal(1,
                    [](auto& writer) {
                      writer.put(0x3f80, 16);
                      put_entry(writer, 99);
                      writer.put(1, 1);
                    }),
            "accepted");
}

TEST_F(HandWritten, EachLieHasItsMessage) {
  const auto scale = [](std::uint32_t bits) {
    return [=](kernels::BitWriter& writer) {
      writer.put(bits, 16);
      put_entry(writer, 3);
      writer.put(0, 1);
    };
  };
  for (const std::uint32_t bits : {0x8000U, 0xbf80U, 0x7f80U, 0x7fc0U, 0xff80U}) {
    EXPECT_NE(refusal(1, scale(bits)).find("scale that is negative or not finite"),
              std::string::npos);
  }
  EXPECT_NE(refusal(1, scale(0)).find("scale is zero though it has entries"), std::string::npos);
  EXPECT_NE(refusal(1, [](auto& w) { w.put(0x3f80, 16), w.put(0, 5); }).find("the other way"),
            std::string::npos);
  EXPECT_NE(refusal(1, [](auto& w) { w.put(0x3f80, 16), w.put(0, 1), w.put(10, 4); })
                .find("announces 10 entries in tile 0"),
            std::string::npos);
  EXPECT_NE(refusal(
                1, [&](auto& w) { scale(0x3f80)(w); }, 1)
                .find("bits too many"),
            std::string::npos);
  EXPECT_NE(refusal(1, [&](auto& w) { scale(0x3f80)(w), w.put(1, 1); }).find("zero bits"),
            std::string::npos);
  EXPECT_NE(refusal(1, [](auto& w) { w.put(0x3f80, 16); }).find("has entries"), std::string::npos);
  EXPECT_NE(refusal(1, [](auto& w) { w.put(0x3f80, 16), w.put(1, 1); }).find("ends too early"),
            std::string::npos);
  EXPECT_NE(refusal(1,
                    [](auto& w) {
                      w.put(0x3f80, 16), w.put(0, 1), w.put(1, 4);
                      w.put(0xfff, 12), w.put(0, 20);
                    })
                .find("index outside tile 0 of 100"),
            std::string::npos);
}

TEST_F(HandWritten, ValuesMustBeFiniteAndNotZero) {
  for (const std::uint32_t bits :
       {0U, 0x80000000U, 0x7f800000U, 0xff800000U, 0x7fc00000U, 0x7f800001U}) {
    EXPECT_NE(
        refusal(32, [=](auto& w) { put_entry(w, 3), w.put(bits, 32); }).find("zero or not finite"),
        std::string::npos);
  }
  EXPECT_EQ(refusal(32, [](auto& w) { put_entry(w, 3), w.put(0x80000001U, 32); }), "accepted");
}

TEST(HostileRecord, ARecordOfAnotherGeometryIsRefused) {
  Simulation one({{10000, kernels::DType::f32}}, {}, {.ranks = 1});
  one.step(0.1);
  for (const std::size_t elements : {4096U, 20000U, 9000000U}) {
    const WeightsCodec other(Geometry(std::vector<std::size_t>{elements}), {});
    EXPECT_THROW((void)other.parse(one.last[0].record, 0), RecordError);
  }
}

}  // namespace
}  // namespace distro::plugins
