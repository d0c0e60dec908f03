#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/aligned.h"
#include "kernels/kernels.h"

namespace distro::plugins {

using TileBuffer = std::array<float, kernels::kTileElements>;

/// The memory of R in the flat order: fp32, or rounded to bf16; or none, where x says what R is.
/// Tiles may be opened and closed by several threads, each by one.
class ResidualStore {
 public:
  explicit ResidualStore(std::uint32_t bits) noexcept : rounds_(bits == 16) {}

  [[nodiscard]] bool kept() const noexcept { return !exact_.empty() || !rounded_.empty(); }
  [[nodiscard]] bool rounds() const noexcept { return rounds_; }
  /// From now on there is memory for so many values; zeros, unless it was there.
  void keep(std::size_t elements);
  /// There is none any more, and it goes back.
  void drop() noexcept;
  void fill_zeros() noexcept;

  /// The values of a tile that begins here, to read and to change. Nothing may have them open.
  /// Where R is rounded they lie in the buffer; `read`: whether they have to be those that are
  /// kept.
  [[nodiscard]] float* open(const kernels::KernelTable& kernels, std::size_t begin,
                            std::size_t elements, bool read, TileBuffer& buffer) noexcept;
  /// Keeps what open() gave; `values` are then what is kept.
  void close(const kernels::KernelTable& kernels, float* values, std::size_t begin,
             std::size_t elements) noexcept;

  /// Copies from and to the memory, which is kept.
  void read(std::size_t begin, std::span<float> values) const noexcept;
  void write(std::size_t begin, std::span<const float> values) noexcept;

 private:
  bool rounds_;
  kernels::HugeVector<float> exact_;
  kernels::HugeVector<std::uint16_t> rounded_;
};

}  // namespace distro::plugins
