#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "kernels/kernels.h"
#include "kernels/sparse_sum.h"
#include "plugins/geometry.h"
#include "plugins/module_codec.h"

/// One tile's part in a step of the `weights` codec. w and r point at the tile's first element.
namespace distro::plugins {

/// The first tensor that has a non-finite weight in the tile, if any.
std::optional<std::size_t> non_finite_in_tile(const kernels::KernelTable& kernels,
                                              std::span<const Segment> segments,
                                              std::span<const TensorView> x) noexcept;

/// W = x rounded to fp32.
void adopt_tile(const kernels::KernelTable& kernels, std::span<const Segment> segments,
                std::span<const TensorView> x, float* w) noexcept;

/// R += x - (x as it was left), for one segment; w and r point at the segment's first element.
/// Returns the sum of |move|.
double absorb_segment(const kernels::KernelTable& kernels, const Segment& segment,
                      std::span<const TensorView> x, const float* w, float* r,
                      float share) noexcept;

/// R += x - (x as it was left). Returns the sum of |move|.
double absorb_tile(const kernels::KernelTable& kernels, std::span<const Segment> segments,
                   std::span<const TensorView> x, const float* w, float* r, float share) noexcept;

/// x = W + share * R.
void restore_tile(const kernels::KernelTable& kernels, std::span<const Segment> segments,
                  std::span<const TensorView> x, const float* w, const float* r,
                  float share) noexcept;

/// W += gain * sum of weight * q, in participant order; R -= own q. `sum` is empty before and
/// after. Returns the change of the checksum of W.
std::uint64_t apply_tile(const Due& due, std::size_t tile, std::size_t begin, float* w, float* r,
                         kernels::SparseSum& sum) noexcept;

}  // namespace distro::plugins
