#include "plugins/residual_store.h"

#include <algorithm>

#include "kernels/half.h"

namespace distro::plugins {

void ResidualStore::keep(std::size_t elements) {
  if (rounds_) {
    rounded_.resize(elements);
  } else {
    exact_.resize(elements);
  }
}

void ResidualStore::drop() noexcept {
  // A vector of its own, which gives its memory back.
  kernels::HugeVector<float>().swap(exact_);
  kernels::HugeVector<std::uint16_t>().swap(rounded_);
}

void ResidualStore::fill_zeros() noexcept {
  std::ranges::fill(exact_, 0.0F);
  std::ranges::fill(rounded_, std::uint16_t{0});
}

float* ResidualStore::open(const kernels::KernelTable& kernels, std::size_t begin,
                           std::size_t elements, bool read, TileBuffer& buffer) noexcept {
  if (!rounds_) {
    return exact_.data() + begin;
  }
  if (read) {
    kernels.gather(kernels::DType::bf16, rounded_.data() + begin, elements, buffer.data(), 1,
                   elements);
  }
  return buffer.data();
}

void ResidualStore::close(const kernels::KernelTable& kernels, float* values, std::size_t begin,
                          std::size_t elements) noexcept {
  if (!rounds_) {
    return;
  }
  std::uint16_t* const kept = rounded_.data() + begin;
  kernels.scatter(kernels::DType::bf16, values, kept, elements, 1, elements,
                  kernels::Store::cached);
  kernels.gather(kernels::DType::bf16, kept, elements, values, 1, elements);
}

void ResidualStore::read(std::size_t begin, std::span<float> values) const noexcept {
  if (rounds_) {
    std::transform(rounded_.data() + begin, rounded_.data() + begin + values.size(), values.begin(),
                   kernels::from_bf16);
  } else {
    std::copy_n(exact_.data() + begin, values.size(), values.begin());
  }
}

void ResidualStore::write(std::size_t begin, std::span<const float> values) noexcept {
  if (rounds_) {
    std::ranges::transform(values, rounded_.data() + begin, kernels::to_bf16);
  } else {
    std::ranges::copy(values, exact_.data() + begin);
  }
}

}  // namespace distro::plugins
