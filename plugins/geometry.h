#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "plugins/tile_layout.h"

namespace distro::plugins {

/// A run of weights of one tensor inside a tile.
struct Segment {
  std::size_t tensor = 0;        ///< Index of the tensor.
  std::size_t tensor_begin = 0;  ///< First element within the tensor.
  std::size_t tile_begin = 0;    ///< First element within the tile.
  std::size_t elements = 0;
};

/// 4096 (or, at an end, fewer) weights that share one selection.
struct Tile {
  std::size_t begin = 0;  ///< First element in the flat order of W and R.
  std::size_t elements = 0;
  std::size_t first_segment = 0;
  std::size_t segments = 0;
};

/// How the weights of a module are cut into tiles; the same on all ranks. A run of tiles is of one
/// tensor, or of the pool of small ones.
///
/// Flat order of W and R: first every tensor of at least 4096 elements, in order, each beginning a
/// tile of its own and cut every 4096 elements; then the pool: all smaller tensors, one after the
/// other, cut every 4096 elements of the pool, so that small tensors share tiles (a norm of 768
/// weights alone would need two entries of its own).
class Geometry {
 public:
  /// elements[i]: number of weights of tensor i. Zero-element tensors are allowed and have no tile.
  explicit Geometry(std::span<const std::size_t> elements);

  [[nodiscard]] std::size_t tensors() const noexcept { return offsets_.size(); }
  [[nodiscard]] std::size_t elements() const noexcept { return elements_; }
  [[nodiscard]] std::size_t tensor_elements(std::size_t tensor) const { return sizes_[tensor]; }
  /// Where the tensor begins in the flat order (it is contiguous there).
  [[nodiscard]] std::size_t offset(std::size_t tensor) const { return offsets_[tensor]; }
  [[nodiscard]] std::span<const Tile> tiles() const noexcept { return tiles_; }
  [[nodiscard]] std::span<const Segment> segments(const Tile& tile) const noexcept {
    return std::span(segments_).subspan(tile.first_segment, tile.segments);
  }
  /// The same tiles, as a record sees them.
  [[nodiscard]] const TileLayout& layout() const noexcept { return layout_; }
  [[nodiscard]] std::span<const TileRun> runs() const noexcept { return layout_.runs(); }

 private:
  std::size_t elements_ = 0;
  std::vector<std::size_t> sizes_;
  std::vector<std::size_t> offsets_;
  std::vector<Tile> tiles_;
  std::vector<Segment> segments_;
  TileLayout layout_;
};

}  // namespace distro::plugins
