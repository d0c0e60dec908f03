#include "plugins/geometry.h"

#include <algorithm>

namespace distro::plugins {
namespace {

constexpr std::size_t kRunTiles = 16;

void add_runs(std::vector<TileRun>& runs, std::size_t first_tile, std::size_t end_tile) {
  for (std::size_t tile = first_tile; tile < end_tile; tile += kRunTiles) {
    runs.push_back({tile, std::min(kRunTiles, end_tile - tile)});
  }
}

}  // namespace

Geometry::Geometry(std::span<const std::size_t> elements)
    : sizes_(elements.begin(), elements.end()), offsets_(elements.size()) {
  constexpr std::size_t kFull = kernels::kTileElements;

  for (std::size_t tensor = 0; tensor < sizes_.size(); ++tensor) {
    if (sizes_[tensor] < kFull) {
      continue;
    }
    const std::size_t first_tile = tiles_.size();
    offsets_[tensor] = elements_;
    for (std::size_t begin = 0; begin < sizes_[tensor]; begin += kFull) {
      const std::size_t n = std::min(kFull, sizes_[tensor] - begin);
      tiles_.push_back({elements_, n, segments_.size(), 1});
      segments_.push_back({tensor, begin, 0, n});
      elements_ += n;
    }
    add_runs(runs_, first_tile, tiles_.size());
  }

  const std::size_t first_pool_tile = tiles_.size();
  for (std::size_t tensor = 0; tensor < sizes_.size(); ++tensor) {
    if (sizes_[tensor] >= kFull) {
      continue;
    }
    offsets_[tensor] = elements_;
    for (std::size_t begin = 0; begin < sizes_[tensor];) {
      if (tiles_.size() == first_pool_tile || tiles_.back().elements == kFull) {
        tiles_.push_back({elements_, 0, segments_.size(), 0});
      }
      Tile& tile = tiles_.back();
      const std::size_t n = std::min(kFull - tile.elements, sizes_[tensor] - begin);
      segments_.push_back({tensor, begin, tile.elements, n});
      ++tile.segments;
      tile.elements += n;
      elements_ += n;
      begin += n;
    }
  }
  add_runs(runs_, first_pool_tile, tiles_.size());
}

}  // namespace distro::plugins
