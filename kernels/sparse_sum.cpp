#include "kernels/sparse_sum.h"

namespace distro::kernels {
namespace {

#include "kernels/mix.inc"

}  // namespace

void SparseSum::add(float weight, std::span<const std::uint16_t> index,
                    std::span<const float> value) noexcept {
  for (std::size_t i = 0; i < index.size(); ++i) {
    const std::size_t j = index[i];
    sum_[j] += weight * value[i];
    touched_[j / kWordBits] |= std::uint64_t{1} << (j % kWordBits);
  }
}

std::uint64_t SparseSum::move_into(float* w, float gain, std::uint64_t first) noexcept {
  std::uint64_t change = 0;
  drain([&](std::size_t j, float sum) {
    const float before = w[j];
    w[j] = moved(before, gain, sum);
    change += mix_one(first + j, w[j]) - mix_one(first + j, before);
  });
  return change;
}

std::uint64_t SparseSum::move_into(float* w, float gain, std::uint64_t first, float* pending,
                                   float held) noexcept {
  std::uint64_t change = 0;
  drain([&](std::size_t j, float sum) {
    const float before = w[j];
    w[j] = moved(before, gain, sum);
    pending[j] = moved(pending[j], held, sum);
    change += mix_one(first + j, w[j]) - mix_one(first + j, before);
  });
  return change;
}

std::size_t SparseSum::take(std::uint16_t* index, float* value) noexcept {
  std::size_t entries = 0;
  drain([&](std::size_t j, float sum) {
    index[entries] = static_cast<std::uint16_t>(j);
    value[entries++] = sum;
  });
  return entries;
}

}  // namespace distro::kernels
