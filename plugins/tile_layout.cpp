#include "plugins/tile_layout.h"

#include <algorithm>

namespace distro::plugins {

void TileLayout::add(std::span<const std::size_t> sizes) {
  constexpr std::size_t kRunTiles = 16;
  const std::size_t end = sizes_.size() + sizes.size();
  for (std::size_t tile = sizes_.size(); tile < end; tile += kRunTiles) {
    runs_.push_back({tile, std::min(kRunTiles, end - tile)});
  }
  sizes_.insert(sizes_.end(), sizes.begin(), sizes.end());
}

}  // namespace distro::plugins
