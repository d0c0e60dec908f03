#include "plugins/gradient_layout.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <stdexcept>

#include "kernels/dct_basis.h"

namespace distro::plugins {
namespace {

constexpr std::size_t kSide = kernels::kLargestSide;
static_assert(kSide * kSide == kernels::kTileElements);

/// Number of elements of a shape.
std::size_t count(std::size_t tensor, std::span<const std::int64_t> shape) {
  const bool empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
  std::int64_t elements = 1;
  bool impossible = false;
  for (const std::int64_t n : shape) {
    impossible |= n < 0;
    impossible |= !empty && __builtin_mul_overflow(elements, n, &elements);
  }
  if (impossible) {
    throw std::invalid_argument(
        fmt::format("tensor {} has the impossible shape [{}]", tensor, fmt::join(shape, ", ")));
  }
  return empty ? 0 : static_cast<std::size_t>(elements);
}

}  // namespace

GradientLayout::GradientLayout(std::span<const std::vector<std::int64_t>> shapes) {
  for (std::size_t tensor = 0; tensor < shapes.size(); ++tensor) {
    const std::size_t elements = count(tensor, shapes[tensor]);
    sizes_.push_back(elements);
    if (elements == 0) {
      continue;
    }
    // A dimension of one says nothing about which elements are neighbours.
    std::vector<std::size_t> dimensions;
    for (const std::int64_t n : shapes[tensor]) {
      if (n > 1) {
        dimensions.push_back(static_cast<std::size_t>(n));
      }
    }
    const std::size_t first_block = blocks_.size();
    if (dimensions.size() >= 2) {
      cut(dimensions[0], elements / dimensions[0]);
    } else {
      cut(elements / kSide, kSide);
      if (const std::size_t rest = elements % kSide; rest > 0) {
        blocks_.push_back({elements - rest, rest, 1, rest, 0});
      }
    }
    pack(tensor, first_block);
  }
}

void GradientLayout::cut(std::size_t rows, std::size_t columns) {
  for (std::size_t row = 0; row < rows; row += kSide) {
    for (std::size_t column = 0; column < columns; column += kSide) {
      blocks_.push_back({row * columns + column, columns, std::min(kSide, rows - row),
                         std::min(kSide, columns - column), 0});
    }
  }
}

void GradientLayout::pack(std::size_t tensor, std::size_t first_block) {
  const std::size_t first_tile = tiles_.size();
  std::size_t begin = 0;
  for (std::size_t block = first_block; block < blocks_.size(); ++block) {
    const std::size_t n = blocks_[block].elements();
    if (tiles_.size() == first_tile || tiles_.back().elements + n > kernels::kTileElements) {
      tiles_.push_back({tensor, begin, 0, block, 0});
    }
    GradientTile& tile = tiles_.back();
    blocks_[block].tile_begin = tile.elements;
    tile.elements += n;
    ++tile.blocks;
    begin += n;
  }
  std::vector<std::size_t> sizes;
  for (const GradientTile& tile : tiles().subspan(first_tile)) {
    sizes.push_back(tile.elements);
  }
  layout_.add(sizes);
}

}  // namespace distro::plugins
