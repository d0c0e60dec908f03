#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "kernels/kernels.h"
#include "kernels/sparse_sum.h"
#include "plugins/geometry.h"
#include "plugins/module_codec.h"

/// One tile's part in a step of the `weights` codec. w and r point at the tile's first element; x
/// are all tensors of the geometry.
namespace distro::plugins {

/// W = x rounded to fp32.
void adopt_tile(const kernels::KernelTable& kernels, const Geometry& geometry, const Tile& tile,
                std::span<const TensorView> x, float* w) noexcept;

/// R += x - (x as it was left with this share); null: R = x - W. Returns the sum of |move|;
/// nothing, and R is as it was, where not all |x| of the tile are below kernels::kLargestWeight.
[[nodiscard]] std::optional<double> absorb_tile(const kernels::KernelTable& kernels,
                                                const Geometry& geometry, const Tile& tile,
                                                std::span<const TensorView> x, const float* w,
                                                float* r, const float* share) noexcept;

/// x = W + share * R.
void restore_tile(const kernels::KernelTable& kernels, const Geometry& geometry, const Tile& tile,
                  std::span<const TensorView> x, const float* w, const float* r,
                  float share) noexcept;

/// x = W + R at the touched entries, of fp32 or fp64 weights.
void restore_touched(const Geometry& geometry, const Tile& tile, std::span<const TensorView> x,
                     const float* w, const float* r,
                     std::span<const std::uint16_t> touched) noexcept;

/// What a tile has of P.
struct Pending {
  std::span<float> values;  ///< Empty: no gain is spread.
  Spread spread;
};

/// W and R of the tile that comes next, whose entries are fetched; null: they are not.
struct Next {
  const float* w = nullptr;
  const float* r = nullptr;
};

/// W += gain * sum of weight * q, in participant order; R -= own q. P += what is spread of it, and
/// of P a part has come. `tile`: its number in its turn; `begin`: its first element in the flat
/// order. Leaves in `sum` what was added. Returns the change of the checksum of W.
[[nodiscard]] std::uint64_t apply_tile(const kernels::KernelTable& kernels, const Due& due,
                                       std::size_t tile, std::size_t begin, float* w, float* r,
                                       const Pending& pending, const Next& next,
                                       kernels::SparseSum& sum) noexcept;

}  // namespace distro::plugins
