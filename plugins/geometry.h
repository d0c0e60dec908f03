#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "plugins/tile_layout.h"

namespace distro::plugins {

/// Where weights of a tensor stand when they take turns: consecutive ones of which all have the
/// same turn. A cache line of fp32; a longer one is rather part of one row of a matrix.
inline constexpr std::size_t kTurnElements = 16;

/// Weights of one tensor and one turn inside a tile: side by side there, and in the tensor every
/// `turns`-th stretch of kTurnElements (all of them, where there is one turn).
struct Segment {
  std::size_t tensor = 0;        ///< Index of the tensor.
  std::size_t tensor_begin = 0;  ///< First element within the tensor.
  std::size_t tile_begin = 0;    ///< First element within the tile.
  std::size_t elements = 0;
};

/// 4096 (or, at an end, fewer) weights of one turn that share one selection.
struct Tile {
  std::size_t begin = 0;  ///< First element in the flat order of W and R.
  std::size_t elements = 0;
  std::size_t first_segment = 0;
  std::size_t segments = 0;
};

/// How the weights of a module are cut into turns and tiles; the same on all ranks. An exchange is
/// of one turn. A run of tiles is of one tensor, or of the pool of small ones.
///
/// Flat order of W and R: turn after turn; in each, first every tensor of at least 4096 elements,
/// in order, its elements of the turn beginning a tile of their own and cut every 4096; then the
/// pool: those of all smaller tensors, one after the other, cut every 4096 elements of the pool, so
/// that small tensors share tiles (a norm of 768 weights alone would need two entries of its own).
class Geometry {
 public:
  /// elements[i]: number of weights of tensor i. Zero-element tensors are allowed and have no tile.
  explicit Geometry(std::span<const std::size_t> elements, std::size_t turns = 1);

  [[nodiscard]] std::size_t turns() const noexcept { return layouts_.size(); }
  /// The turn that exchange `number` is of.
  [[nodiscard]] std::size_t turn_of(std::uint64_t number) const noexcept {
    return static_cast<std::size_t>(number % layouts_.size());
  }
  [[nodiscard]] std::size_t tensors() const noexcept { return sizes_.size(); }
  [[nodiscard]] std::size_t elements() const noexcept { return elements_; }
  [[nodiscard]] std::size_t tensor_elements(std::size_t tensor) const { return sizes_[tensor]; }

  [[nodiscard]] std::span<const Tile> tiles() const noexcept { return tiles_; }
  /// Those of one turn, consecutive in the flat order.
  [[nodiscard]] std::span<const Tile> tiles(std::size_t turn) const noexcept {
    return tiles().subspan(first_tile_[turn], first_tile_[turn + 1] - first_tile_[turn]);
  }
  /// Weights that have their turn in it.
  [[nodiscard]] std::size_t elements(std::size_t turn) const noexcept;
  [[nodiscard]] std::span<const Segment> segments(const Tile& tile) const noexcept {
    return std::span(segments_).subspan(tile.first_segment, tile.segments);
  }
  /// Where a tensor's weights are, turn by turn; in each in the tensor's order.
  struct Place {
    std::size_t tile = 0;  ///< In tiles().
    std::size_t segment = 0;
  };
  [[nodiscard]] std::span<const Place> places(std::size_t tensor) const { return places_[tensor]; }
  [[nodiscard]] const Segment& segment(const Place& place) const noexcept {
    return segments_[place.segment];
  }
  /// The tiles of a turn, as a record sees them.
  [[nodiscard]] const TileLayout& layout(std::size_t turn) const noexcept { return layouts_[turn]; }
  [[nodiscard]] std::span<const TileRun> runs(std::size_t turn) const noexcept {
    return layouts_[turn].runs();
  }

  /// Where entry j of a tile, one of the segment, is in the tensor.
  [[nodiscard]] std::size_t element(const Segment& segment, std::size_t j) const noexcept {
    const std::size_t inside = segment.tensor_begin % kTurnElements;
    const std::size_t place = inside + j - segment.tile_begin;
    return segment.tensor_begin - inside + place / kTurnElements * turns() * kTurnElements +
           place % kTurnElements;
  }

  /// Calls visit(first element in the tensor, first element in the tile, elements) for each stretch
  /// of the segment that is consecutive in the tensor.
  template <class Visit>
  void for_each_stretch(const Segment& segment, const Visit& visit) const {
    if (turns() == 1) {
      visit(segment.tensor_begin, segment.tile_begin, segment.elements);
      return;
    }
    const std::size_t end = segment.tile_begin + segment.elements;
    std::size_t from = segment.tensor_begin;
    for (std::size_t to = segment.tile_begin; to < end;) {
      const std::size_t inside = from % kTurnElements;
      const std::size_t n = std::min(kTurnElements - inside, end - to);
      visit(from, to, n);
      from += turns() * kTurnElements - inside;
      to += n;
    }
  }

 private:
  /// The number of a tensor's elements that have this turn.
  [[nodiscard]] std::size_t part(std::size_t tensor, std::size_t turn) const noexcept;
  void add_turn(std::size_t turn);

  std::size_t elements_ = 0;
  std::vector<std::size_t> sizes_;
  std::vector<Tile> tiles_;
  std::vector<std::size_t> first_tile_{0};  // by turn, and the end
  std::vector<Segment> segments_;
  std::vector<std::vector<Place>> places_;  // by tensor
  std::vector<TileLayout> layouts_;         // by turn
};

}  // namespace distro::plugins
