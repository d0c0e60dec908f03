#include "plugins/gradient_tile.h"

#include <algorithm>
#include <array>
#include <limits>

namespace distro::plugins {
namespace {

/// The weighted sum of what all ranks sent, in rank order, by entry; demo divides it by the weight
/// of those that sent anything. Returns the number of entries.
std::size_t sum_up(GradientMethod method, std::size_t tile,
                   std::span<const Contribution> contributions, DecodeScratch& scratch) noexcept {
  kernels::SparseSum& sum = scratch.sum;
  for (const auto& [record, weight] : contributions) {
    sum.add(weight, record->indices(tile), record->values(tile));
  }
  std::size_t entries = 0;
  sum.drain([&](std::size_t j, float value) {
    scratch.index[entries] = static_cast<std::uint16_t>(j);
    scratch.sums[entries++] = value;
  });
  if (method == GradientMethod::ef) {
    return entries;
  }
  scratch.values.fill(1.0F);
  for (const auto& [record, weight] : contributions) {
    const std::span<const std::uint16_t> index = record->indices(tile);
    sum.add(weight, index, std::span(scratch.values).first(index.size()));
  }
  std::size_t i = 0;
  sum.drain([&](std::size_t /*j*/, float weight) {
    scratch.sums[i] = weight > 0.0F ? scratch.sums[i] / weight : 0.0F;
    ++i;
  });
  return entries;
}

}  // namespace

void absorb_gradient(const kernels::KernelTable& kernels, const GradientConfig& config,
                     std::span<const GradientBlock> blocks, const TensorView& gradient, float* m,
                     EncodeScratch& scratch) noexcept {
  for (const GradientBlock& block : blocks) {
    const void* const first = address(gradient, block.first);
    const bool in_place =
        gradient.dtype == kernels::DType::f32 && config.transform == Transform::dct;
    const float* elements = static_cast<const float*>(first);
    std::size_t stride = block.stride;
    if (!in_place) {
      kernels.gather(gradient.dtype, first, block.stride, scratch.elements.data(), block.rows,
                     block.columns);
      elements = scratch.elements.data();
      stride = block.columns;
    }
    const float* added = elements;
    if (config.transform == Transform::dct) {
      kernels.dct(elements, stride, scratch.coefficients.data(), block.rows, block.columns);
      added = scratch.coefficients.data();
    }
    kernels.decay_and_add(m + block.tile_begin, added, block.elements(), config.beta);
  }
}

void decode_tile(const kernels::KernelTable& kernels, const GradientConfig& config,
                 std::span<const GradientBlock> blocks, std::size_t tile,
                 std::span<const Contribution> contributions, const TensorView& out,
                 kernels::Store how, DecodeScratch& scratch) noexcept {
  const std::size_t entries = sum_up(config.method, tile, contributions, scratch);
  std::size_t next = 0;
  for (const GradientBlock& block : blocks) {
    // The block's entries, by their place in it.
    const std::size_t first = next;
    const std::size_t end = block.tile_begin + block.elements();
    for (; next < entries && scratch.index[next] < end; ++next) {
      scratch.index[next] = static_cast<std::uint16_t>(scratch.index[next] - block.tile_begin);
    }
    float* const result = scratch.values.data();
    if (config.transform == Transform::dct) {
      kernels.inverse_dct(&scratch.index[first], &scratch.sums[first], next - first, result,
                          block.rows, block.columns);
    } else {
      std::fill_n(result, block.elements(), 0.0F);
      for (std::size_t i = first; i < next; ++i) {
        result[scratch.index[i]] = scratch.sums[i];
      }
    }
    if (config.method == GradientMethod::demo) {
      kernels.signs(result, block.elements());
    }
    kernels.scatter(out.dtype, result, address(out, block.first), block.stride, block.rows,
                    block.columns, how);
  }
}

void fill_nan(const kernels::KernelTable& kernels, std::span<const GradientBlock> blocks,
              const TensorView& out) noexcept {
  std::array<float, kernels::kTileElements> values{};
  values.fill(std::numeric_limits<float>::quiet_NaN());
  for (const GradientBlock& block : blocks) {
    kernels.scatter(out.dtype, values.data(), address(out, block.first), block.stride, block.rows,
                    block.columns, kernels::Store::cached);
  }
}

}  // namespace distro::plugins
