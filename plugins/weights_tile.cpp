#include "plugins/weights_tile.h"

namespace distro::plugins {

std::optional<std::size_t> non_finite_in_tile(const kernels::KernelTable& kernels,
                                              std::span<const Segment> segments,
                                              std::span<const TensorView> x) noexcept {
  for (const Segment& segment : segments) {
    const TensorView& tensor = x[segment.tensor];
    if (!kernels.finite(tensor.dtype, address(tensor, segment.tensor_begin), segment.elements)) {
      return segment.tensor;
    }
  }
  return std::nullopt;
}

void adopt_tile(const kernels::KernelTable& kernels, std::span<const Segment> segments,
                std::span<const TensorView> x, float* w) noexcept {
  for (const Segment& segment : segments) {
    const TensorView& tensor = x[segment.tensor];
    kernels.adopt(tensor.dtype, address(tensor, segment.tensor_begin), w + segment.tile_begin,
                  segment.elements);
  }
}

double absorb_segment(const kernels::KernelTable& kernels, const Segment& segment,
                      std::span<const TensorView> x, const float* w, float* r,
                      float share) noexcept {
  const TensorView& tensor = x[segment.tensor];
  return kernels
      .absorb(tensor.dtype, address(tensor, segment.tensor_begin), w, r, segment.elements, share)
      .absolute_sum;
}

double absorb_tile(const kernels::KernelTable& kernels, std::span<const Segment> segments,
                   std::span<const TensorView> x, const float* w, float* r, float share) noexcept {
  double moved = 0.0;
  for (const Segment& segment : segments) {
    moved +=
        absorb_segment(kernels, segment, x, w + segment.tile_begin, r + segment.tile_begin, share);
  }
  return moved;
}

void restore_tile(const kernels::KernelTable& kernels, std::span<const Segment> segments,
                  std::span<const TensorView> x, const float* w, const float* r,
                  float share) noexcept {
  for (const Segment& segment : segments) {
    const TensorView& tensor = x[segment.tensor];
    kernels.restore(tensor.dtype, address(tensor, segment.tensor_begin), w + segment.tile_begin,
                    r + segment.tile_begin, segment.elements, share);
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
