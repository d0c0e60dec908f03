#include "plugins/gradient_layout.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <random>

#include "tests/seed.h"

namespace distro::plugins {
namespace {

using Shapes = std::vector<std::vector<std::int64_t>>;

/// Blocks of each tile as "rows x columns", tiles apart by "|".
std::string cut(std::vector<std::int64_t> shape) {
  const GradientLayout layout(Shapes{std::move(shape)});
  std::string text;
  for (const GradientTile& tile : layout.tiles()) {
    text += text.empty() ? "" : " | ";
    for (const GradientBlock& block : layout.blocks(tile)) {
      text += fmt::format("{}{}x{}", &block == layout.blocks(tile).data() ? "" : " ", block.rows,
                          block.columns);
    }
  }
  return text;
}

TEST(GradientLayout, MatricesAreCutIntoBlocksThatShareTilesAtTheEdges) {
  EXPECT_EQ(cut({64, 128}), "64x64 | 64x64");
  EXPECT_EQ(cut({65, 130}), "64x64 | 64x64 | 64x2 1x64 1x64 1x2");
  EXPECT_EQ(cut({3, 150}), "3x64 3x64 3x22");
  EXPECT_EQ(cut({80, 100}), "64x64 | 64x36 16x64 16x36");
}

TEST(GradientLayout, EveryShapeIsAMatrixOrARow) {
  EXPECT_EQ(cut({}), "1x1");
  EXPECT_EQ(cut({1, 1}), "1x1");
  EXPECT_EQ(cut({7}), "1x7");
  EXPECT_EQ(cut({768}), "12x64");
  EXPECT_EQ(cut({4096 + 130}), "64x64 | 2x64 1x2");
  EXPECT_EQ(cut({1, 1, 130}), "2x64 1x2");
  EXPECT_EQ(cut({130, 1}), "2x64 1x2");
  EXPECT_EQ(cut({64, 3, 3, 3}), "64x27");
  EXPECT_EQ(cut({1, 20, 70}), "20x64 20x6");
  EXPECT_EQ(cut({4, 0}), "");
}

TEST(GradientLayout, CoversEveryElementOnce) {
  const auto seed = test::seed();
  fmt::print("seed {}\n", seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 60; ++round) {
    Shapes shapes(1 + random() % 5);
    for (std::vector<std::int64_t>& shape : shapes) {
      shape.resize(random() % 5);
      for (std::int64_t& n : shape) {
        n = static_cast<std::int64_t>(random() % (random() % 3 == 0  ? 4
                                                  : shape.size() > 2 ? 20
                                                                     : 300));
      }
    }
    const GradientLayout layout(shapes);
    ASSERT_EQ(layout.tensors(), shapes.size());
    ASSERT_EQ(layout.layout().tiles(), layout.tiles().size());
    std::vector<std::vector<int>> seen;
    std::vector<std::size_t> next(shapes.size());
    for (std::size_t tensor = 0; tensor < shapes.size(); ++tensor) {
      seen.emplace_back(layout.tensor_elements(tensor));
    }
    for (const TileRun& run : layout.layout().runs()) {
      ASSERT_LE(run.tiles, 16U);
      for (const GradientTile& tile : layout.tiles(run)) {
        ASSERT_EQ(tile.tensor, layout.tiles(run).front().tensor);
        ASSERT_EQ(tile.begin, next[tile.tensor]);
        std::size_t in_tile = 0;
        for (const GradientBlock& block : layout.blocks(tile)) {
          ASSERT_TRUE(block.rows >= 1 && block.rows <= 64);
          ASSERT_TRUE(block.columns >= 1 && block.columns <= 64);
          ASSERT_EQ(block.tile_begin, in_tile);
          in_tile += block.elements();
          for (std::size_t i = 0; i < block.elements(); ++i) {
            ++seen[tile.tensor].at(block.first + i / block.columns * block.stride +
                                   i % block.columns);
          }
        }
        ASSERT_EQ(in_tile, tile.elements);
        ASSERT_LE(in_tile, 4096U);
        next[tile.tensor] += in_tile;
      }
    }
    for (const std::vector<int>& tensor : seen) {
      ASSERT_EQ(tensor, std::vector<int>(tensor.size(), 1));
    }
  }
}

TEST(GradientLayout, RefusesImpossibleShapes) {
  constexpr std::int64_t kHuge = std::int64_t{1} << 40;
  EXPECT_THROW(GradientLayout(Shapes{{3, -1}}), std::invalid_argument);
  EXPECT_THROW(GradientLayout(Shapes{{0, -1}}), std::invalid_argument);
  EXPECT_THROW(GradientLayout(Shapes{{kHuge, kHuge}}), std::invalid_argument);
  EXPECT_EQ(GradientLayout(Shapes{{kHuge, kHuge, 0}}).tensor_elements(0), 0U);
}

}  // namespace
}  // namespace distro::plugins
