#include "plugins/geometry.h"

#include <algorithm>

namespace distro::plugins {
namespace {

/// Adds these tiles, which share runs.
void add_runs(TileLayout& layout, std::span<const Tile> tiles) {
  std::vector<std::size_t> sizes;
  for (const Tile& tile : tiles) {
    sizes.push_back(tile.elements);
  }
  layout.add(sizes);
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
    add_runs(layout_, tiles().subspan(first_tile));
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
  add_runs(layout_, tiles().subspan(first_pool_tile));
}

}  // namespace distro::plugins
