#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <stdexcept>
#include <vector>

#include "plugins/weights_defaults.h"
#include "simulation.h"

namespace distro::plugins {
namespace {

TEST(Geometry, BigTensorsBeginATileAndSmallOnesShare) {
  const std::vector<std::size_t> elements{100, 4096, 0, 4095, 10000, 1};
  const Geometry geometry(elements);
  EXPECT_EQ(geometry.tensors(), 6U);
  EXPECT_EQ(geometry.elements(), 100U + 4096 + 4095 + 10000 + 1);
  std::vector<std::size_t> offsets(6);  // in the flat order
  for_each_weight(geometry, [&](std::size_t tensor, std::size_t i, std::size_t flat) {
    offsets[tensor] = i == 0 ? flat : offsets[tensor];
    EXPECT_EQ(flat, offsets[tensor] + i);
  });
  EXPECT_EQ(offsets, (std::vector<std::size_t>{14096, 0, 0, 14196, 4096, 18291}));

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
  EXPECT_EQ(geometry.runs(0).size(), 3U);
}

TEST(Geometry, RunsHoldAtMost16TilesOfOneTensor) {
  const std::vector<std::size_t> elements(3, 4096 * 20);
  const Geometry geometry(elements);
  ASSERT_EQ(geometry.runs(0).size(), 6U);
  EXPECT_EQ(geometry.runs(0)[0].tiles, 16U);
  EXPECT_EQ(geometry.runs(0)[1].tiles, 4U);
  EXPECT_EQ(geometry.runs(0)[2].first_tile, 20U);
}

TEST(Geometry, NothingHasNoTile) {
  const Geometry none(std::span<const std::size_t>{});
  EXPECT_TRUE(none.tiles().empty());
  const std::vector<std::size_t> zeros(4, 0);
  const Geometry empty(zeros);
  EXPECT_EQ(empty.tensors(), 4U);
  EXPECT_TRUE(empty.tiles().empty());
  EXPECT_TRUE(empty.runs(0).empty());
}

TEST(Geometry, CoversEveryWeightOnceInItsTurn) {
  std::mt19937 random(6);
  for (int round = 0; round < 60; ++round) {
    std::vector<std::size_t> elements(random() % 12);
    for (std::size_t& n : elements) {
      n = random() % 3 == 0 ? random() % 200000 : random() % 6000;
    }
    constexpr std::size_t kTurns[] = {1, 2, 3, 16};
    const std::size_t turns = kTurns[round % 4];
    const Geometry geometry(elements, turns);
    ASSERT_EQ(geometry.turns(), turns);
    std::size_t flat = 0;
    std::size_t tiles = 0;
    for (std::size_t turn = 0; turn < turns; ++turn) {
      const std::size_t begin = flat;
      for (const Tile& tile : geometry.tiles(turn)) {
        ASSERT_EQ(tile.begin, flat);
        ASSERT_GE(tile.elements, 1U);
        ASSERT_LE(tile.elements, kernels::kTileElements);
        std::size_t inside = 0;
        for (const Segment& segment : geometry.segments(tile)) {
          ASSERT_EQ(segment.tile_begin, inside);
          geometry.for_each_stretch(segment, [&](std::size_t at, std::size_t j, std::size_t n) {
            ASSERT_EQ(j, inside);
            for (std::size_t i = at; turns > 1 && i < at + n; ++i) {
              ASSERT_EQ(i / kTurnElements % turns, turn);
            }
            inside += n;
          });
        }
        ASSERT_EQ(inside, tile.elements);
        flat += tile.elements;
      }
      EXPECT_EQ(geometry.elements(turn), flat - begin);
      std::size_t of_turn = 0;
      for (const TileRun& run : geometry.runs(turn)) {
        ASSERT_EQ(run.first_tile, of_turn);
        ASSERT_GE(run.tiles, 1U);
        ASSERT_LE(run.tiles, 16U);
        of_turn += run.tiles;
      }
      EXPECT_EQ(of_turn, geometry.tiles(turn).size());
      tiles += of_turn;
    }
    EXPECT_EQ(tiles, geometry.tiles().size());
    EXPECT_EQ(flat, geometry.elements());
    std::vector<std::vector<int>> seen;
    for (const std::size_t n : elements) {
      seen.emplace_back(n);
    }
    for_each_weight(geometry, [&](std::size_t tensor, std::size_t i, std::size_t) {
      ASSERT_LT(i, elements[tensor]);
      ++seen[tensor][i];
    });
    for (const std::vector<int>& tensor : seen) {
      EXPECT_TRUE(std::ranges::all_of(tensor, [](int times) { return times == 1; }));
    }
  }
}

TEST(Geometry, NoTurnsAreRefused) {
  EXPECT_THROW(Geometry(std::vector<std::size_t>{5}, 0), std::invalid_argument);
}

TEST(Turns, AreFewerTheMoreIsSent) {
  EXPECT_EQ(default_turns(1), 16U);
  EXPECT_EQ(default_turns(6), 16U);
  EXPECT_EQ(default_turns(16), 16U);
  EXPECT_EQ(default_turns(17), 8U);
  EXPECT_EQ(default_turns(48), 4U);
  EXPECT_EQ(default_turns(128), 2U);
  EXPECT_EQ(default_turns(129), 1U);
  EXPECT_EQ(default_turns(4096), 1U);
  EXPECT_EQ(kept_of_turn(6, 16), 96U);
  EXPECT_EQ(kept_of_turn(1000, 16), 4096U);
}

TEST(Geometry, KeptRoundsUp) {
  EXPECT_EQ(TileLayout::kept(6, 4096), 6U);
  EXPECT_EQ(TileLayout::kept(6, 1), 1U);
  EXPECT_EQ(TileLayout::kept(6, 683), 2U);
  EXPECT_EQ(TileLayout::kept(4096, 77), 77U);
}

}  // namespace
}  // namespace distro::plugins
