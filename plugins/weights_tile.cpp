#include "plugins/weights_tile.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace distro::plugins {
namespace {

/// Room for the weights of a tile of any types, each segment from its own place on.
struct Buffer {
  alignas(kernels::kCacheLineBytes)
      std::array<std::byte, kernels::kTileElements * sizeof(double)> bytes;

  [[nodiscard]] std::byte* of(const Segment& segment) noexcept {
    return bytes.data() + segment.tile_begin * sizeof(double);
  }
};

// Stretches fetched ahead: the hardware does not follow a stride across pages.
constexpr std::size_t kAhead = 16;

// Entries of a record that are fetched ahead.
constexpr std::size_t kEntriesAhead = 128;

/// Calls copy(address in the tensor, address in the buffer, bytes) for each stretch; `bytes` is a
/// constant where the stretch is whole.
template <std::size_t kBytes, class Copy>
void for_each_copy(const Geometry& geometry, const Segment& segment, const TensorView& x,
                   Buffer& buffer, const Copy& copy) noexcept {
  auto* const from = static_cast<std::byte*>(x.data);
  geometry.for_each_stretch(segment, [&](std::size_t at, std::size_t j, std::size_t n) {
    std::byte* const here = from + at * kBytes;
    std::byte* const there = buffer.of(segment) + (j - segment.tile_begin) * kBytes;
    __builtin_prefetch(here + kAhead * geometry.turns() * kTurnElements * kBytes);
    if (n == kTurnElements) {
      copy(here, there, kTurnElements * kBytes);
    } else {
      copy(here, there, n * kBytes);
    }
  });
}

template <class Copy>
void for_each_copy(const Geometry& geometry, const Segment& segment, const TensorView& x,
                   Buffer& buffer, const Copy& copy) noexcept {
  switch (kernels::size_of(x.dtype)) {
    case 2:
      return for_each_copy<2>(geometry, segment, x, buffer, copy);
    case 4:
      return for_each_copy<4>(geometry, segment, x, buffer, copy);
    default:
      return for_each_copy<8>(geometry, segment, x, buffer, copy);
  }
}

/// Where the weights of a segment lie side by side: in their tensor, or at their place in the
/// buffer, of the tile's size.
void* where_gathered(const Geometry& geometry, const Segment& segment, const TensorView& x,
                     Buffer& buffer) noexcept {
  return geometry.turns() == 1 ? address(x, segment.tensor_begin) : buffer.of(segment);
}

/// They are there.
const void* gathered(const Geometry& geometry, const Segment& segment, const TensorView& x,
                     Buffer& buffer) noexcept {
  if (geometry.turns() > 1) {
    for_each_copy(
        geometry, segment, x, buffer,
        [](const std::byte* from, std::byte* to, std::size_t bytes)
            __attribute__((always_inline)) { std::memcpy(to, from, bytes); });
  }
  return where_gathered(geometry, segment, x, buffer);
}

}  // namespace

void adopt_tile(const kernels::KernelTable& kernels, const Geometry& geometry, const Tile& tile,
                std::span<const TensorView> x, float* w) noexcept {
  Buffer buffer;
  for (const Segment& segment : geometry.segments(tile)) {
    const TensorView& tensor = x[segment.tensor];
    kernels.adopt(tensor.dtype, gathered(geometry, segment, tensor, buffer), w + segment.tile_begin,
                  segment.elements);
  }
}

std::optional<double> absorb_tile(const kernels::KernelTable& kernels, const Geometry& geometry,
                                  const Tile& tile, std::span<const TensorView> x, const float* w,
                                  float* r, const float* share) noexcept {
  // All are looked at before any changes R.
  Buffer buffer;
  bool finite = true;
  for (const Segment& segment : geometry.segments(tile)) {
    const TensorView& tensor = x[segment.tensor];
    finite = kernels.finite(tensor.dtype, gathered(geometry, segment, tensor, buffer),
                            segment.elements) &&
             finite;
  }
  if (!finite) {
    return std::nullopt;
  }
  double moved = 0.0;
  for (const Segment& segment : geometry.segments(tile)) {
    const TensorView& tensor = x[segment.tensor];
    const void* const weights = where_gathered(geometry, segment, tensor, buffer);
    const float* const segment_w = w + segment.tile_begin;
    float* const segment_r = r + segment.tile_begin;
    moved +=
        share == nullptr
            ? kernels.derive(tensor.dtype, weights, segment_w, segment_r, segment.elements)
            : kernels.absorb(tensor.dtype, weights, segment_w, segment_r, segment.elements, *share);
  }
  return moved;
}

void restore_tile(const kernels::KernelTable& kernels, const Geometry& geometry, const Tile& tile,
                  std::span<const TensorView> x, const float* w, const float* r,
                  float share) noexcept {
  Buffer buffer;
  for (const Segment& segment : geometry.segments(tile)) {
    const TensorView& tensor = x[segment.tensor];
    kernels.restore(tensor.dtype, where_gathered(geometry, segment, tensor, buffer),
                    w + segment.tile_begin, r + segment.tile_begin, segment.elements, share);
    if (geometry.turns() > 1) {
      for_each_copy(
          geometry, segment, tensor, buffer,
          [](std::byte * to, const std::byte* from, std::size_t bytes)
              __attribute__((always_inline)) { std::memcpy(to, from, bytes); });
    }
  }
}

void restore_touched(const Geometry& geometry, const Tile& tile, std::span<const TensorView> x,
                     const float* w, const float* r,
                     std::span<const std::uint16_t> touched) noexcept {
  const std::span<const Segment> segments = geometry.segments(tile);
  for (const std::uint16_t j : touched) {
    const Segment& segment = *std::ranges::partition_point(
        segments, [&](const Segment& of) { return of.tile_begin + of.elements <= j; });
    const TensorView& tensor = x[segment.tensor];
    const std::size_t at = geometry.element(segment, j);
    if (tensor.dtype == kernels::DType::f32) {
      static_cast<float*>(tensor.data)[at] = w[j] + r[j];
    } else {
      static_cast<double*>(tensor.data)[at] = static_cast<double>(w[j]) + static_cast<double>(r[j]);
    }
  }
}

std::uint64_t apply_tile(const kernels::KernelTable& kernels, const Due& due, std::size_t tile,
                         std::size_t begin, float* w, float* r, const Pending& pending,
                         const Next& next, kernels::SparseSum& sum) noexcept {
  sum.clear();
  for (std::size_t participant = 0; participant < due.contributions.size(); ++participant) {
    const auto& [record, weight] = due.contributions[participant];
    const std::span<const std::uint16_t> index = record->indices(tile);
    const std::span<const float> value = record->values(tile);
    // The hardware follows few streams at a time, and these are two of each participant.
    __builtin_prefetch(index.data() + kEntriesAhead);
    __builtin_prefetch(value.data() + kEntriesAhead);
    sum.add(weight, index, value);
    if (participant == due.own) {
      for (std::size_t i = 0; i < index.size(); ++i) {
        r[index[i]] -= value[i];
      }
    }
    // Some after some of the work: only so many can be on their way at once.
    if (next.w != nullptr) {
      for (const std::uint16_t j : record->indices(tile + 1)) {
        __builtin_prefetch(next.w + j, 1);
      }
    }
  }
  if (!pending.values.empty()) {
    for (std::size_t i = 0; i < sum.index().size(); ++i) {
      float& p = pending.values[sum.index()[i]];
      p = kernels::moved(p, pending.spread.gain, sum.sum()[i]);
    }
    for (float& p : pending.values) {
      p *= pending.spread.keep;
    }
  }
  if (next.r != nullptr) {
    for (const std::uint16_t j : due.contributions[due.own].record->indices(tile + 1)) {
      __builtin_prefetch(next.r + j, 1);
    }
  }
  return kernels.move(w, sum.index().data(), sum.sum().data(), sum.index().size(), due.gain, begin);
}

}  // namespace distro::plugins
