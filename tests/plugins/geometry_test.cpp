#include "plugins/geometry.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace distro::plugins {
namespace {

TEST(Geometry, BigTensorsBeginATileAndSmallOnesShare) {
  const std::vector<std::size_t> elements{100, 4096, 0, 4095, 10000, 1};
  const Geometry geometry(elements);
  EXPECT_EQ(geometry.tensors(), 6U);
  EXPECT_EQ(geometry.elements(), 100U + 4096 + 4095 + 10000 + 1);
  EXPECT_EQ(geometry.offset(1), 0U);
  EXPECT_EQ(geometry.offset(4), 4096U);
  EXPECT_EQ(geometry.offset(0), 14096U);
  EXPECT_EQ(geometry.offset(3), 14196U);
  EXPECT_EQ(geometry.offset(5), 18291U);

  std::vector<std::size_t> sizes;
  for (const Tile& tile : geometry.tiles()) {
    sizes.push_back(tile.elements);
  }
  EXPECT_EQ(sizes, (std::vector<std::size_t>{4096, 4096, 4096, 1808, 4096, 100}));

  const auto pool = geometry.segments(geometry.tiles()[4]);
  ASSERT_EQ(pool.size(), 2U);
  EXPECT_EQ(pool[0].tensor, 0U);
  EXPECT_EQ(pool[1].tensor, 3U);
  EXPECT_EQ(pool[1].tile_begin, 100U);
  EXPECT_EQ(pool[1].elements, 3996U);
  const auto rest = geometry.segments(geometry.tiles()[5]);
  ASSERT_EQ(rest.size(), 2U);
  EXPECT_EQ(rest[0].tensor_begin, 3996U);
  EXPECT_EQ(rest[1].tensor, 5U);
  EXPECT_EQ(rest[1].tile_begin, 99U);
  EXPECT_EQ(geometry.runs().size(), 3U);
}

TEST(Geometry, RunsHoldAtMost16TilesOfOneTensor) {
  const std::vector<std::size_t> elements(3, 4096 * 20);
  const Geometry geometry(elements);
  ASSERT_EQ(geometry.runs().size(), 6U);
  EXPECT_EQ(geometry.runs()[0].tiles, 16U);
  EXPECT_EQ(geometry.runs()[1].tiles, 4U);
  EXPECT_EQ(geometry.runs()[2].first_tile, 20U);
}

TEST(Geometry, NothingHasNoTile) {
  const Geometry none(std::span<const std::size_t>{});
  EXPECT_TRUE(none.tiles().empty());
  const std::vector<std::size_t> zeros(4, 0);
  const Geometry empty(zeros);
  EXPECT_EQ(empty.tensors(), 4U);
  EXPECT_TRUE(empty.tiles().empty());
  EXPECT_TRUE(empty.runs().empty());
}

TEST(Geometry, CoversEveryWeightOnce) {
  std::mt19937 random(6);
  for (int round = 0; round < 50; ++round) {
    std::vector<std::size_t> elements(random() % 12);
    for (std::size_t& n : elements) {
      n = random() % 3 == 0 ? random() % 200000 : random() % 6000;
    }
    const Geometry geometry(elements);
    std::vector<std::size_t> seen(elements.size());
    std::size_t flat = 0;
    for (const Tile& tile : geometry.tiles()) {
      ASSERT_EQ(tile.begin, flat);
      ASSERT_GE(tile.elements, 1U);
      ASSERT_LE(tile.elements, kernels::kTileElements);
      std::size_t inside = 0;
      for (const Segment& segment : geometry.segments(tile)) {
        ASSERT_EQ(segment.tile_begin, inside);
        ASSERT_EQ(segment.tensor_begin, seen[segment.tensor]);
        ASSERT_EQ(geometry.offset(segment.tensor) + segment.tensor_begin, tile.begin + inside);
        inside += segment.elements;
        seen[segment.tensor] += segment.elements;
      }
      ASSERT_EQ(inside, tile.elements);
      flat += tile.elements;
    }
    EXPECT_EQ(seen, elements);
    EXPECT_EQ(flat, geometry.elements());
    std::size_t tiles = 0;
    for (const TileRun& run : geometry.runs()) {
      ASSERT_EQ(run.first_tile, tiles);
      ASSERT_GE(run.tiles, 1U);
      ASSERT_LE(run.tiles, 16U);
      tiles += run.tiles;
    }
    EXPECT_EQ(tiles, geometry.tiles().size());
  }
}

TEST(Geometry, KeptRoundsUp) {
  EXPECT_EQ(TileLayout::kept(6, 4096), 6U);
  EXPECT_EQ(TileLayout::kept(6, 1), 1U);
  EXPECT_EQ(TileLayout::kept(6, 683), 2U);
  EXPECT_EQ(TileLayout::kept(4096, 77), 77U);
}

}  // namespace
}  // namespace distro::plugins
