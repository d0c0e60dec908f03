#include "plugins/gradient_tile.h"

#include <algorithm>
#include <array>
#include <limits>

#include "kernels/sparse_sum.h"

namespace distro::plugins {
namespace {

using TileValues = std::array<float, kernels::kTileElements>;

/// The weighted sum of what all ranks sent, in rank order; demo divides it by the weight of those
/// that sent anything.
void sum_up(GradientMethod method, std::size_t tile, std::span<const Contribution> contributions,
            TileValues& sums) noexcept {
  kernels::SparseSum sum;
  for (const auto& [record, weight] : contributions) {
    sum.add(weight, record->indices(tile), record->values(tile));
  }
  sum.take(sums.data());
  if (method == GradientMethod::ef) {
    return;
  }
  TileValues ones;
  ones.fill(1.0F);
  for (const auto& [record, weight] : contributions) {
    const std::span<const std::uint16_t> index = record->indices(tile);
    sum.add(weight, index, std::span(ones).first(index.size()));
  }
  TileValues weights{};
  sum.take(weights.data());
  for (std::size_t i = 0; i < sums.size(); ++i) {
    sums[i] = weights[i] > 0.0F ? sums[i] / weights[i] : 0.0F;
  }
}

}  // namespace

void absorb_gradient(const kernels::KernelTable& kernels, const GradientConfig& config,
                     std::span<const GradientBlock> blocks, const TensorView& gradient,
                     float* m) noexcept {
  TileValues values;
  TileValues coefficients;
  for (const GradientBlock& block : blocks) {
    kernels.gather(gradient.dtype, address(gradient, block.first), block.stride, values.data(),
                   block.rows, block.columns);
    const float* added = values.data();
    if (config.transform == Transform::dct) {
      kernels.dct(values.data(), coefficients.data(), block.rows, block.columns);
      added = coefficients.data();
    }
    kernels.decay_and_add(m + block.tile_begin, added, block.elements(), config.beta);
  }
}

void decode_tile(const kernels::KernelTable& kernels, const GradientConfig& config,
                 std::span<const GradientBlock> blocks, std::size_t tile,
                 std::span<const Contribution> contributions, const TensorView& out) noexcept {
  TileValues sums{};
  sum_up(config.method, tile, contributions, sums);
  TileValues values;
  for (const GradientBlock& block : blocks) {
    float* result = sums.data() + block.tile_begin;
    if (config.transform == Transform::dct) {
      kernels.inverse_dct(result, values.data(), block.rows, block.columns);
      result = values.data();
    }
    if (config.method == GradientMethod::demo) {
      kernels.signs(result, block.elements());
    }
    kernels.scatter(out.dtype, result, address(out, block.first), block.stride, block.rows,
                    block.columns);
  }
}

void fill_nan(const kernels::KernelTable& kernels, std::span<const GradientBlock> blocks,
              const TensorView& out) noexcept {
  TileValues values;
  values.fill(std::numeric_limits<float>::quiet_NaN());
  for (const GradientBlock& block : blocks) {
    kernels.scatter(out.dtype, values.data(), address(out, block.first), block.stride, block.rows,
                    block.columns);
  }
}

}  // namespace distro::plugins
