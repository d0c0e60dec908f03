#include "kernels/sparse_sum.h"

namespace distro::kernels {

void SparseSum::add(float weight, std::span<const std::uint16_t> index,
                    std::span<const float> value) noexcept {
  // Without a branch: whether another participant sent the entry, too, cannot be predicted.
  std::size_t entries = entries_;
  for (std::size_t i = 0; i < index.size(); ++i) {
    const std::size_t j = index[i];
    const std::size_t place = place_[j];
    const std::size_t first = place == 0 ? 1 : 0;
    const std::size_t next = entries + 1;
    index_[next] = index[i];
    sum_[next] = 0.0F;
    const std::size_t at = place + first * next;
    place_[j] = static_cast<std::uint16_t>(at);
    sum_[at] += weight * value[i];
    entries += first;
  }
  entries_ = entries;
}

void SparseSum::clear() noexcept {
  for (const std::uint16_t j : index()) {
    place_[j] = 0;
  }
  entries_ = 0;
}

}  // namespace distro::kernels
