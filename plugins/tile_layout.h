#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/kernels.h"

namespace distro::plugins {

/// Consecutive tiles that share one scale and are one task: at most 16.
struct TileRun {
  std::size_t first_tile = 0;
  std::size_t tiles = 0;
};

/// What a record knows of the values that it carries: they are cut into tiles, each with a
/// selection of its own, and tiles into runs. What a tile's values are is its codec's affair.
class TileLayout {
 public:
  /// Append tiles of these sizes (1 to 4096 values each), in runs of their own.
  void add(std::span<const std::size_t> sizes);

  [[nodiscard]] std::size_t tiles() const noexcept { return sizes_.size(); }
  [[nodiscard]] std::size_t tile_size(std::size_t tile) const noexcept { return sizes_[tile]; }
  [[nodiscard]] std::span<const TileRun> runs() const noexcept { return runs_; }

  /// Entries that a tile of n values keeps: ceil(k n / 4096).
  [[nodiscard]] static std::size_t kept(std::uint32_t k, std::size_t n) noexcept {
    return (std::size_t{k} * n + kernels::kTileElements - 1) / kernels::kTileElements;
  }

 private:
  std::vector<std::size_t> sizes_;
  std::vector<TileRun> runs_;
};

}  // namespace distro::plugins
