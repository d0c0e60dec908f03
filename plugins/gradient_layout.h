#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "plugins/tile_layout.h"

namespace distro::plugins {

/// A rectangle of a tensor's matrix, of at most 64 x 64 elements, which is transformed by itself.
struct GradientBlock {
  std::size_t first = 0;   ///< Its first element in the tensor.
  std::size_t stride = 0;  ///< Elements from one row to the next.
  std::size_t rows = 0;
  std::size_t columns = 0;
  std::size_t tile_begin = 0;  ///< Its first value in the tile.

  [[nodiscard]] std::size_t elements() const noexcept { return rows * columns; }
};

/// Consecutive blocks of one tensor that share one selection: at most 4096 elements.
struct GradientTile {
  std::size_t tensor = 0;
  std::size_t begin = 0;  ///< Its first value in the tensor's residual.
  std::size_t elements = 0;
  std::size_t first_block = 0;
  std::size_t blocks = 0;
};

/// How a list of gradient tensors is cut; the same on all ranks. GradientCodec says how.
class GradientLayout {
 public:
  /// shapes[i]: dimensions of tensor i. Throws std::invalid_argument on a negative dimension, or
  /// where the elements are more than can be counted.
  explicit GradientLayout(std::span<const std::vector<std::int64_t>> shapes);

  [[nodiscard]] std::size_t tensors() const noexcept { return sizes_.size(); }
  [[nodiscard]] std::size_t tensor_elements(std::size_t tensor) const { return sizes_[tensor]; }
  [[nodiscard]] std::span<const GradientTile> tiles() const noexcept { return tiles_; }
  [[nodiscard]] std::span<const GradientBlock> blocks(const GradientTile& tile) const noexcept {
    return std::span(blocks_).subspan(tile.first_block, tile.blocks);
  }
  [[nodiscard]] std::span<const GradientTile> tiles(const TileRun& run) const noexcept {
    return tiles().subspan(run.first_tile, run.tiles);
  }
  /// The same tiles, as a record sees them; a run is of one tensor.
  [[nodiscard]] const TileLayout& layout() const noexcept { return layout_; }

 private:
  void cut(std::size_t rows, std::size_t columns);
  void pack(std::size_t tensor, std::size_t first_block);

  std::vector<std::size_t> sizes_;
  std::vector<GradientTile> tiles_;
  std::vector<GradientBlock> blocks_;
  TileLayout layout_;
};

}  // namespace distro::plugins
