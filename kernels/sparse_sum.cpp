#include "kernels/sparse_sum.h"

#include <bit>

namespace distro::kernels {

void SparseSum::add(float weight, std::span<const std::uint16_t> index,
                    std::span<const float> value) noexcept {
  for (std::size_t i = 0; i < index.size(); ++i) {
    const std::size_t j = index[i];
    sum_[j] += weight * value[i];
    touched_[j / kWordBits] |= std::uint64_t{1} << (j % kWordBits);
  }
}

template <class Visit>
void SparseSum::drain(const Visit& visit) noexcept {
  for (std::size_t word = 0; word < touched_.size(); ++word) {
    for (std::uint64_t left = touched_[word]; left != 0; left &= left - 1) {
      const std::size_t j = word * kWordBits + static_cast<std::size_t>(std::countr_zero(left));
      visit(j);
      sum_[j] = 0.0F;
    }
    touched_[word] = 0;
  }
}

std::uint64_t SparseSum::move_into(float* w, float gain, std::uint64_t first) noexcept {
  std::uint64_t change = 0;
  drain([&](std::size_t j) {
    const float before = w[j];
    w[j] = before + gain * sum_[j];
    change += mix(first + j, w[j]) - mix(first + j, before);
  });
  return change;
}

void SparseSum::take(float* out) noexcept {
  drain([&](std::size_t j) { out[j] = sum_[j]; });
}

}  // namespace distro::kernels
