#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "kernels/kernels.h"
#include "kernels/sparse_sum.h"
#include "plugins/gradient.h"
#include "plugins/gradient_layout.h"

/// One tile's part in a step of the gradient codec.
namespace distro::plugins {

/// Memory of one task that encodes, 32 KiB for the stack.
struct EncodeScratch {
  std::array<float, kernels::kTileElements> elements{};
  std::array<float, kernels::kTileElements> coefficients{};
};

/// M = beta * M + transform(gradient); m points at the tile's first value.
void absorb_gradient(const kernels::KernelTable& kernels, const GradientConfig& config,
                     std::span<const GradientBlock> blocks, const TensorView& gradient, float* m,
                     EncodeScratch& scratch) noexcept;

/// Memory of one task that decodes, 72 KiB for the stack. The sum is empty between tiles.
struct DecodeScratch {
  using Values = std::array<float, kernels::kTileElements>;
  kernels::SparseSum sum;
  std::array<std::uint16_t, kernels::kTileElements> index;
  Values sums;
  Values values;
};

/// The result of what all ranks sent for this tile.
void decode_tile(const kernels::KernelTable& kernels, const GradientConfig& config,
                 std::span<const GradientBlock> blocks, std::size_t tile,
                 std::span<const Contribution> contributions, const TensorView& out,
                 kernels::Store how, DecodeScratch& scratch) noexcept;

/// NaN in all elements of the tile.
void fill_nan(const kernels::KernelTable& kernels, std::span<const GradientBlock> blocks,
              const TensorView& out) noexcept;

}  // namespace distro::plugins
