#include "plugins/weights_tile.h"

namespace distro::plugins {

void adopt_tile(const kernels::KernelTable& kernels, const Geometry& geometry, const Tile& tile,
                std::span<const TensorView> x, float* w) noexcept {
  for (const Segment& segment : geometry.segments(tile)) {
    const TensorView& tensor = x[segment.tensor];
    geometry.for_each_stretch(segment, [&](std::size_t at, std::size_t j, std::size_t n) {
      kernels.adopt(tensor.dtype, address(tensor, at), w + j, n);
    });
  }
}

double absorb_tile(const kernels::KernelTable& kernels, const Geometry& geometry, const Tile& tile,
                   std::span<const TensorView> x, const float* w, float* r, float share) noexcept {
  double moved = 0.0;
  for (const Segment& segment : geometry.segments(tile)) {
    const TensorView& tensor = x[segment.tensor];
    geometry.for_each_stretch(segment, [&](std::size_t at, std::size_t j, std::size_t n) {
      moved +=
          kernels.absorb(tensor.dtype, address(tensor, at), w + j, r + j, n, share).absolute_sum;
    });
  }
  return moved;
}

void restore_tile(const kernels::KernelTable& kernels, const Geometry& geometry, const Tile& tile,
                  std::span<const TensorView> x, const float* w, const float* r,
                  float share) noexcept {
  for (const Segment& segment : geometry.segments(tile)) {
    const TensorView& tensor = x[segment.tensor];
    geometry.for_each_stretch(segment, [&](std::size_t at, std::size_t j, std::size_t n) {
      kernels.restore(tensor.dtype, address(tensor, at), w + j, r + j, n, share);
    });
  }
}

std::uint64_t apply_tile(const Due& due, std::size_t tile, std::size_t begin, float* w, float* r,
                         kernels::SparseSum& sum) noexcept {
  // Where no pass over the tile precedes this one, every entry of w is a cache miss: fetch them all
  // at once.
  for (std::size_t participant = 0; participant < due.contributions.size(); ++participant) {
    const ParsedRecord& record = *due.contributions[participant].record;
    for (std::size_t i = record.first[tile]; i < record.first[tile + 1]; ++i) {
      __builtin_prefetch(w + record.index[i], 1);
      if (participant == due.own) {
        __builtin_prefetch(r + record.index[i], 1);
      }
    }
  }
  for (std::size_t participant = 0; participant < due.contributions.size(); ++participant) {
    const auto& [record, weight] = due.contributions[participant];
    const std::span<const std::uint16_t> index = record->indices(tile);
    const std::span<const float> value = record->values(tile);
    sum.add(weight, index, value);
    if (participant == due.own) {
      for (std::size_t i = 0; i < index.size(); ++i) {
        r[index[i]] -= value[i];
      }
    }
  }
  return sum.move_into(w, due.gain, begin);
}

}  // namespace distro::plugins
