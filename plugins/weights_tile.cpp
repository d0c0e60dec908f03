#include "plugins/weights_tile.h"

#include <array>
#include <cstring>

namespace distro::plugins {
namespace {

/// Room for the weights of a segment of any type.
struct Buffer {
  alignas(64) std::array<std::byte, kernels::kTileElements * sizeof(double)> bytes;
};

// Stretches fetched ahead: the hardware does not follow a stride across pages.
constexpr std::size_t kAhead = 16;

/// Calls copy(address in the tensor, address in the buffer, bytes) for each stretch; `bytes` is a
/// constant where the stretch is whole.
template <std::size_t kBytes, class Copy>
void for_each_copy(const Geometry& geometry, const Segment& segment, const TensorView& x,
                   Buffer& buffer, const Copy& copy) noexcept {
  auto* const from = static_cast<std::byte*>(x.data);
  geometry.for_each_stretch(segment, [&](std::size_t at, std::size_t j, std::size_t n) {
    std::byte* const here = from + at * kBytes;
    std::byte* const there = buffer.bytes.data() + (j - segment.tile_begin) * kBytes;
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

/// The weights of a segment side by side: where they are if they lie so, or copied to the buffer.
const void* gathered(const Geometry& geometry, const Segment& segment, const TensorView& x,
                     Buffer& buffer) noexcept {
  if (geometry.turns() == 1) {
    return address(x, segment.tensor_begin);
  }
  for_each_copy(
      geometry, segment, x, buffer,
      [](const std::byte* from, std::byte* to, std::size_t bytes)
          __attribute__((always_inline)) { std::memcpy(to, from, bytes); });
  return buffer.bytes.data();
}

}  // namespace

bool finite_tile(const kernels::KernelTable& kernels, const Geometry& geometry, const Tile& tile,
                 std::span<const TensorView> x) noexcept {
  Buffer buffer;
  bool finite = true;
  for (const Segment& segment : geometry.segments(tile)) {
    const TensorView& tensor = x[segment.tensor];
    finite = kernels.finite(tensor.dtype, gathered(geometry, segment, tensor, buffer),
                            segment.elements) &&
             finite;
  }
  return finite;
}

void adopt_tile(const kernels::KernelTable& kernels, const Geometry& geometry, const Tile& tile,
                std::span<const TensorView> x, float* w) noexcept {
  Buffer buffer;
  for (const Segment& segment : geometry.segments(tile)) {
    const TensorView& tensor = x[segment.tensor];
    kernels.adopt(tensor.dtype, gathered(geometry, segment, tensor, buffer), w + segment.tile_begin,
                  segment.elements);
  }
}

double absorb_tile(const kernels::KernelTable& kernels, const Geometry& geometry, const Tile& tile,
                   std::span<const TensorView> x, const float* w, float* r, float share) noexcept {
  Buffer buffer;
  double moved = 0.0;
  for (const Segment& segment : geometry.segments(tile)) {
    const TensorView& tensor = x[segment.tensor];
    moved += kernels
                 .absorb(tensor.dtype, gathered(geometry, segment, tensor, buffer),
                         w + segment.tile_begin, r + segment.tile_begin, segment.elements, share)
                 .absolute_sum;
  }
  return moved;
}

void restore_tile(const kernels::KernelTable& kernels, const Geometry& geometry, const Tile& tile,
                  std::span<const TensorView> x, const float* w, const float* r,
                  float share) noexcept {
  Buffer buffer;
  for (const Segment& segment : geometry.segments(tile)) {
    const TensorView& tensor = x[segment.tensor];
    const bool direct = geometry.turns() == 1;
    kernels.restore(tensor.dtype,
                    direct ? address(tensor, segment.tensor_begin) : buffer.bytes.data(),
                    w + segment.tile_begin, r + segment.tile_begin, segment.elements, share);
    if (!direct) {
      for_each_copy(
          geometry, segment, tensor, buffer,
          [](std::byte * to, const std::byte* from, std::size_t bytes)
              __attribute__((always_inline)) { std::memcpy(to, from, bytes); });
    }
  }
}

std::uint64_t apply_tile(const Due& due, std::size_t tile, std::size_t begin, float* w, float* r,
                         const Pending& pending, kernels::SparseSum& sum) noexcept {
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
  if (pending.values.empty()) {
    return sum.move_into(w, due.gain, begin);
  }
  const std::uint64_t change =
      sum.move_into(w, due.gain, begin, pending.values.data(), pending.spread.gain);
  for (float& p : pending.values) {
    p *= pending.spread.keep;
  }
  return change;
}

}  // namespace distro::plugins
