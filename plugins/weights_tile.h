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
                     const kernels::SparseSum::Touched& touched) noexcept;

/// What a tile has of P.
struct Pending {
  std::span<float> values;  ///< Empty: no gain is spread.
  Spread spread;
};

/// Fetches the entries of a tile's W that an exchange changes.
void fetch_entries(const Due& due, std::size_t tile, const float* w) noexcept;

/// What an exchange did to a tile.
struct Applied {
  std::uint64_t checksum = 0;  ///< Change of that of W.
  kernels::SparseSum::Touched touched{};
};

/// W += gain * sum of weight * q, in participant order; R -= own q. P += what is spread of it, and
/// of P a part has come. `sum` is empty before and after. `tile`: its number in its turn.
[[nodiscard]] Applied apply_tile(const Due& due, std::size_t tile, std::size_t begin, float* w,
                                 float* r, const Pending& pending,
                                 kernels::SparseSum& sum) noexcept;

}  // namespace distro::plugins
