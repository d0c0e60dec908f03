#include "plugins/geometry.h"

#include <stdexcept>

namespace distro::plugins {
namespace {

constexpr std::size_t kFull = kernels::kTileElements;

/// Adds these tiles, which share runs.
void add_runs(TileLayout& layout, std::span<const Tile> tiles) {
  std::vector<std::size_t> sizes;
  for (const Tile& tile : tiles) {
    sizes.push_back(tile.elements);
  }
  layout.add(sizes);
}

}  // namespace

Geometry::Geometry(std::span<const std::size_t> elements, std::size_t turns)
    : sizes_(elements.begin(), elements.end()), layouts_(turns) {
  if (turns == 0) {
    throw std::invalid_argument("weights cannot take 0 turns");
  }
  for (std::size_t turn = 0; turn < turns; ++turn) {
    add_turn(turn);
    first_tile_.push_back(tiles_.size());
  }
  places_.resize(sizes_.size());
  for (std::size_t tile = 0; tile < tiles_.size(); ++tile) {
    for (std::size_t i = 0; i < tiles_[tile].segments; ++i) {
      const std::size_t segment = tiles_[tile].first_segment + i;
      places_[segments_[segment].tensor].push_back({tile, segment});
    }
  }
}

std::size_t Geometry::part(std::size_t tensor, std::size_t turn) const noexcept {
  const std::size_t n = sizes_[tensor];
  if (turns() == 1) {
    return n;
  }
  const std::size_t round = turns() * kTurnElements;
  const std::size_t before = turn * kTurnElements;
  const std::size_t rest = n % round;
  return n / round * kTurnElements +
         (rest > before ? std::min(kTurnElements, rest - before) : std::size_t{0});
}

std::size_t Geometry::elements(std::size_t turn) const noexcept {
  const std::span<const Tile> of_turn = tiles(turn);
  return of_turn.empty() ? 0 : of_turn.back().begin + of_turn.back().elements - of_turn[0].begin;
}

void Geometry::add_turn(std::size_t turn) {
  // Where an element of the turn stands in its tensor.
  const auto place = [&](std::size_t element) {
    return turns() == 1 ? element
                        : (element / kTurnElements * turns() + turn) * kTurnElements +
                              element % kTurnElements;
  };
  TileLayout& layout = layouts_[turn];
  for (std::size_t tensor = 0; tensor < sizes_.size(); ++tensor) {
    if (sizes_[tensor] < kFull) {
      continue;
    }
    const std::size_t first_tile = tiles_.size();
    const std::size_t elements = part(tensor, turn);
    for (std::size_t begin = 0; begin < elements; begin += kFull) {
      const std::size_t n = std::min(kFull, elements - begin);
      tiles_.push_back({elements_, n, segments_.size(), 1});
      segments_.push_back({tensor, place(begin), 0, n});
      elements_ += n;
    }
    add_runs(layout, tiles().subspan(first_tile));
  }

  const std::size_t first_pool_tile = tiles_.size();
  for (std::size_t tensor = 0; tensor < sizes_.size(); ++tensor) {
    if (sizes_[tensor] >= kFull) {
      continue;
    }
    const std::size_t elements = part(tensor, turn);
    for (std::size_t begin = 0; begin < elements;) {
      if (tiles_.size() == first_pool_tile || tiles_.back().elements == kFull) {
        tiles_.push_back({elements_, 0, segments_.size(), 0});
      }
      Tile& tile = tiles_.back();
      const std::size_t n = std::min(kFull - tile.elements, elements - begin);
      segments_.push_back({tensor, place(begin), tile.elements, n});
      ++tile.segments;
      tile.elements += n;
      elements_ += n;
      begin += n;
    }
  }
  add_runs(layout, tiles().subspan(first_pool_tile));
}

}  // namespace distro::plugins
