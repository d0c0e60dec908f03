#include "plugins/record_coder.h"
#include "plugins/geometry.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "kernels/half.h"
#include "kernels/kernels.h"
#include "plugins/weights.h"
#include "plugins/weights_defaults.h"

namespace distro::plugins {
namespace {

/// Selects and writes as the codec does.
std::vector<std::byte> encode(const Geometry& geometry, const RecordCoder& coder,
                              const std::vector<float>& r) {
  std::vector<std::byte> staging(coder.staging_bytes());
  std::vector<std::size_t> bits;
  std::vector<std::uint16_t> index(kernels::kTileElements);
  for (std::size_t run = 0; run < geometry.runs(0).size(); ++run) {
    RunWriter writer = coder.writer(run, staging);
    const TileRun& tiles = geometry.runs(0)[run];
    for (const Tile& tile : geometry.tiles(0).subspan(tiles.first_tile, tiles.tiles)) {
      const float* tile_r = r.data() + tile.begin;
      const std::size_t count =
          kernels::table(kernels::best_isa())
              .select(tile_r, tile.elements, TileLayout::kept(coder.format().k, tile.elements),
                      index.data());
      writer.add(std::span(index).first(count), tile_r);
    }
    bits.push_back(writer.finish());
  }
  return coder.assemble(staging, bits);
}

void expect_round_trip(const Geometry& geometry, RecordFormat format, const std::vector<float>& r) {
  const RecordCoder coder(geometry.layout(0), format);
  const ParsedRecord record = coder.parse(encode(geometry, coder, r));
  ASSERT_EQ(record.first.size(), geometry.tiles().size() + 1);
  ASSERT_EQ(record.index.size(), record.first.back());
  ASSERT_EQ(record.value.size(), record.first.back());
  for (const TileRun& run : geometry.runs(0)) {
    double sum = 0.0;
    std::size_t entries = 0;
    std::vector<std::vector<std::uint16_t>> expected;
    for (const Tile& tile : geometry.tiles().subspan(run.first_tile, run.tiles)) {
      std::vector<std::uint16_t>& index = expected.emplace_back(tile.elements);
      index.resize(kernels::table(kernels::Isa::scalar)
                       .select(r.data() + tile.begin, tile.elements,
                               TileLayout::kept(format.k, tile.elements), index.data()));
      for (const std::uint16_t i : index) {
        sum += std::abs(static_cast<double>(r[tile.begin + i]));
      }
      entries += index.size();
    }
    const float scale = entries == 0 ? 0.0F
                                     : kernels::from_bf16(kernels::to_bf16(
                                           static_cast<float>(sum / static_cast<double>(entries))));
    for (std::size_t t = 0; t < run.tiles; ++t) {
      const Tile& tile = geometry.tiles()[run.first_tile + t];
      const std::size_t first = record.first[run.first_tile + t];
      const std::size_t count = record.first[run.first_tile + t + 1] - first;
      if (format.value_bits == 1 && scale == 0.0F) {
        ASSERT_EQ(count, 0U);
        continue;
      }
      ASSERT_EQ(count, expected[t].size());
      for (std::size_t i = 0; i < count; ++i) {
        ASSERT_EQ(record.index[first + i], expected[t][i]);
        const float moved = r[tile.begin + expected[t][i]];
        const float q = format.value_bits == 1 ? std::copysign(scale, moved) : moved;
        ASSERT_EQ(std::bit_cast<std::uint32_t>(record.value[first + i]),
                  std::bit_cast<std::uint32_t>(q));
      }
    }
  }
}

TEST(RecordCoder, ComesBackForRandomShapesAndCounts) {
  std::mt19937 random(8);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 120; ++round) {
    std::vector<std::size_t> elements(1 + random() % 6);
    for (std::size_t& n : elements) {
      n = random() % 4 == 0 ? random() % 150000 : random() % 5000;
    }
    const Geometry geometry(elements);
    const std::uint32_t ks[] = {1, 2, 6, 16, 255, 4095, 4096};
    const RecordFormat format{ks[random() % 7], random() % 2 == 0 ? 1U : 32U};
    const float zeros = static_cast<float>(round % 4) / 3.0F;  // from none to all
    std::vector<float> r(geometry.elements());
    for (float& value : r) {
      value = static_cast<float>(random() % 1000) < 1000 * zeros ? 0.0F : normal(random);
    }
    expect_round_trip(geometry, format, r);
  }
}

TEST(RecordCoder, ManySections) {
  const std::vector<std::size_t> elements(150, 4096);  // a run each: three sections
  const Geometry geometry(elements);
  std::vector<float> r(geometry.elements());
  std::mt19937 random(9);
  for (float& value : r) {
    value = random() % 700 == 0 ? 1.0F : 0.0F;
  }
  expect_round_trip(geometry, {6, 1}, r);
  expect_round_trip(geometry, {6, 32}, r);
}

TEST(RecordCoder, TinyAndHugeValuesStayConsistent) {
  const std::vector<std::size_t> elements{8192};
  const Geometry geometry(elements);
  for (const float value : {std::numeric_limits<float>::denorm_min(), 4e-41F, 1e-40F, 1e-38F,
                            3.3e38F, std::numeric_limits<float>::max()}) {
    std::vector<float> r(8192);
    r[17] = -value;
    r[5000] = value;
    const RecordCoder coder(geometry.layout(0), {6, 1});
    const ParsedRecord record = coder.parse(encode(geometry, coder, r));
    if (value < 4.5e-41F) {  // below half of bf16's smallest: nothing is sent
      EXPECT_TRUE(record.index.empty());
      continue;
    }
    ASSERT_EQ(record.index.size(), 2U);
    EXPECT_EQ(record.value[0], -record.value[1]);
    EXPECT_TRUE(std::isfinite(record.value[1]));
    EXPECT_NEAR(record.value[1] / value, 1.0F, value < 1e-38F ? 0.5F : 0.01F);
    expect_round_trip(geometry, {6, 32}, r);
  }
}

TEST(RecordCoder, EmptyRecordHasNoEntries) {
  const std::vector<std::size_t> elements{300000, 5};
  const Geometry geometry(elements);
  for (const std::uint32_t value_bits : {1U, 32U}) {
    const RecordCoder coder(geometry.layout(0), {6, value_bits});
    const ParsedRecord record = coder.parse(coder.empty());
    EXPECT_EQ(record.first, std::vector<std::uint32_t>(geometry.tiles().size() + 1, 0));
    EXPECT_TRUE(record.index.empty());
  }
  const Geometry none(std::span<const std::size_t>{});
  const RecordCoder coder(none.layout(0), {6, 1});
  EXPECT_TRUE(coder.empty().empty());
  EXPECT_TRUE(coder.parse({}).index.empty());
}

TEST(RecordCoder, RefusesFormatsThatDoNotExist) {
  const std::vector<std::size_t> elements{10};
  const Geometry geometry(elements);
  EXPECT_THROW(RecordCoder(geometry.layout(0), {0, 1}), std::invalid_argument);
  EXPECT_THROW(RecordCoder(geometry.layout(0), {4097, 1}), std::invalid_argument);
  EXPECT_THROW(RecordCoder(geometry.layout(0), {6, 2}), std::invalid_argument);
}

/// GPT-2 small as Hugging Face cuts it: 148 tensors, 124 M weights.
std::vector<std::size_t> gpt2_small() {
  constexpr std::size_t kWide = 768;
  std::vector<std::size_t> elements{50257 * kWide, 1024 * kWide};
  for (int layer = 0; layer < 12; ++layer) {
    for (const std::size_t n :
         {kWide, kWide, 3 * kWide * kWide, 3 * kWide, kWide * kWide, kWide, kWide, kWide,
          4 * kWide * kWide, 4 * kWide, 4 * kWide * kWide, kWide}) {
      elements.push_back(n);
    }
  }
  elements.push_back(kWide);
  elements.push_back(kWide);
  return elements;
}

/// A million random moves, repeated at shifting places: what matters is where the largest lie.
std::vector<float> random_moves(std::size_t elements) {
  std::mt19937 random(10);
  std::normal_distribution<float> normal;
  std::vector<float> some(1 << 20);
  for (float& value : some) {
    value = normal(random);
  }
  std::vector<float> r(elements);
  for (std::size_t i = 0; i < r.size();) {
    const std::size_t from = random() % 4096;
    const std::size_t n = std::min(some.size() - from, r.size() - i);
    std::copy_n(some.begin() + static_cast<std::ptrdiff_t>(from), n,
                r.begin() + static_cast<std::ptrdiff_t>(i));
    i += n;
  }
  return r;
}

TEST(RecordCoder, Gpt2EarnsTheName) {
  const std::vector<std::size_t> elements = gpt2_small();
  ASSERT_EQ(elements.size(), 148U);
  for (const auto& [k, turns] : {std::pair{10U, default_turns(10)}, {6U, std::size_t{1}}}) {
    const Geometry geometry(elements, turns);
    ASSERT_EQ(geometry.elements(), 124439808U);
    // The first turn is the largest.
    const RecordCoder coder(geometry.layout(0), {kept_of_turn(k, turns), 1});
    const std::vector<std::byte> body = encode(geometry, coder, random_moves(geometry.elements(0)));
    const double bytes = static_cast<double>(body.size());
    const auto weights = static_cast<double>(geometry.elements());
    const double bits = bytes * 8 / (weights / 4096);
    const double against_fp32 = weights * 4 / bytes;
    fmt::print(
        "GPT-2 small, K={}, {} turns: {} bytes, {:.2f} bits per 4096 weights, 1/{:.0f} of fp32, "
        "1/{:.0f} of bf16\n",
        k, turns, body.size(), bits, against_fp32, against_fp32 / 2);
    RecordProperty(fmt::format("bits_per_4096_k{}", k), fmt::format("{:.2f}", bits));
    EXPECT_LE(bits, 76.4 - 0.5);  // the exchange room's header and checksums need a little
    EXPECT_GE(against_fp32, 1714.0);
    EXPECT_EQ(coder.parse(body).index.size(), coder.parse(body).first.back());
  }
}

TEST(RecordCoder, FullTilesCostAtMost73AndAHalfBits) {
  const std::vector<std::size_t> elements{4096 * 16 * 64};
  const Geometry geometry(elements);
  const RecordCoder coder(geometry.layout(0), {6, 1});
  std::mt19937 random(11);
  std::normal_distribution<float> normal;
  std::vector<float> r(geometry.elements());
  for (float& value : r) {
    value = normal(random);
  }
  const double bits = static_cast<double>(encode(geometry, coder, r).size()) * 8 / 1024;
  fmt::print("a full tile, K=6: {:.2f} bits\n", bits);
  EXPECT_LE(bits, 73.5);
}

TEST(WeightsRecord, NoRecordIsLargerThanTheBound) {
  const std::vector<std::size_t> elements = {5000, 4096, 3, 70'000};
  const Geometry geometry(elements);
  for (const std::uint32_t k : {1U, 6U, 4096U}) {
    for (const std::uint32_t bits : {1U, 32U}) {
      const RecordCoder coder(geometry.layout(0), {k, bits});
      WeightsCodec codec(Geometry(elements), {k, bits});
      std::vector<std::vector<float>> weights;
      std::vector<TensorView> views;
      for (const std::size_t n : elements) {
        auto& tensor = weights.emplace_back(n);
        views.push_back({tensor.data(), kernels::DType::f32, n});
      }
      codec.begin(views);
      for (auto& tensor : weights) {
        for (std::size_t i = 0; i < tensor.size(); ++i) {
          tensor[i] = static_cast<float>(i + 1);  // the last ones are the largest: longest gaps
        }
      }
      const std::size_t size = codec.encode(views, 0, 0.0F).record.size();
      EXPECT_LE(size, coder.largest_body_bytes());
      EXPECT_GT(4 * size + 100, coder.largest_body_bytes());  // and the bound is no fantasy
    }
  }
}

}  // namespace
}  // namespace distro::plugins
