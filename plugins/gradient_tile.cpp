#include "plugins/gradient_tile.h"

#include <algorithm>
#include <array>
#include <limits>

namespace distro::plugins {
namespace {

/// The weighted sum of what all ranks sent, in rank order; demo divides it by the weight of those
/// that sent anything.
void sum_up(GradientMethod method, std::size_t tile, std::span<const Contribution> contributions,
            DecodeScratch& scratch) noexcept {
  kernels::SparseSum& sum = scratch.sum;
  for (const auto& [record, weight] : contributions) {
    sum.add(weight, record->indices(tile), record->values(tile));
  }
  sum.take(scratch.sums.data());
  if (method == GradientMethod::ef) {
    return;
  }
  scratch.values.fill(1.0F);
  for (const auto& [record, weight] : contributions) {
    const std::span<const std::uint16_t> index = record->indices(tile);
    sum.add(weight, index, std::span(scratch.values).first(index.size()));
  }
  sum.take(scratch.weights.data());
  for (std::size_t i = 0; i < scratch.sums.size(); ++i) {
    const float weight = scratch.weights[i];
    scratch.sums[i] = weight > 0.0F ? scratch.sums[i] / weight : 0.0F;
  }
}

/// Zero again where any rank sent something.
void clear(std::size_t tile, std::span<const Contribution> contributions,
           DecodeScratch& scratch) noexcept {
  for (const Contribution& contribution : contributions) {
    for (const std::uint16_t i : contribution.record->indices(tile)) {
      scratch.sums[i] = 0.0F;
      scratch.weights[i] = 0.0F;
    }
  }
}

}  // namespace

void absorb_gradient(const kernels::KernelTable& kernels, const GradientConfig& config,
                     std::span<const GradientBlock> blocks, const TensorView& gradient, float* m,
                     EncodeScratch& scratch) noexcept {
  for (const GradientBlock& block : blocks) {
    kernels.gather(gradient.dtype, address(gradient, block.first), block.stride,
                   scratch.elements.data(), block.rows, block.columns);
    const float* added = scratch.elements.data();
    if (config.transform == Transform::dct) {
      kernels.dct(scratch.elements.data(), scratch.coefficients.data(), block.rows, block.columns);
      added = scratch.coefficients.data();
    }
    kernels.decay_and_add(m + block.tile_begin, added, block.elements(), config.beta);
  }
}

void decode_tile(const kernels::KernelTable& kernels, const GradientConfig& config,
                 std::span<const GradientBlock> blocks, std::size_t tile,
                 std::span<const Contribution> contributions, const TensorView& out,
                 DecodeScratch& scratch) noexcept {
  sum_up(config.method, tile, contributions, scratch);
  for (const GradientBlock& block : blocks) {
    const float* const sums = scratch.sums.data() + block.tile_begin;
    float* const result = scratch.values.data();
    if (config.transform == Transform::dct) {
      kernels.inverse_dct(sums, result, block.rows, block.columns);
    } else {
      std::copy_n(sums, block.elements(), result);
    }
    if (config.method == GradientMethod::demo) {
      kernels.signs(result, block.elements());
    }
    kernels.scatter(out.dtype, result, address(out, block.first), block.stride, block.rows,
                    block.columns);
  }
  clear(tile, contributions, scratch);
}

void fill_nan(const kernels::KernelTable& kernels, std::span<const GradientBlock> blocks,
              const TensorView& out) noexcept {
  std::array<float, kernels::kTileElements> values{};
  values.fill(std::numeric_limits<float>::quiet_NaN());
  for (const GradientBlock& block : blocks) {
    kernels.scatter(out.dtype, values.data(), address(out, block.first), block.stride, block.rows,
                    block.columns);
  }
}

}  // namespace distro::plugins
