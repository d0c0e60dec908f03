#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/kernels.h"

namespace distro::kernels {

/// What KernelTable::move() makes of one entry.
[[nodiscard]] inline float moved(float before, float gain, float sum) noexcept {
  return before + gain * sum;
}

/// The weighted sum of sparse entries in one tile, in fp32 and in the order of the calls. 32 KiB,
/// for the stack; empty after construction, clear() and drain(). But for a table of 8 KiB only
/// what entries need of it is touched.
class SparseSum {
 public:
  // Leaves alone what no entry needs yet: it would cost more than the entries of a tile do.
  SparseSum() noexcept {}  // NOLINT(*-member-init, modernize-use-equals-default)

  /// sum[index[i]] += weight * value[i], for each i in order. Indices below kTileElements.
  void add(float weight, std::span<const std::uint16_t> index,
           std::span<const float> value) noexcept;

  /// The entries that were added to, each once, in no order.
  [[nodiscard]] std::span<const std::uint16_t> index() const noexcept {
    return std::span(index_).subspan(1, entries_);
  }
  /// The sum of each.
  [[nodiscard]] std::span<const float> sum() const noexcept {
    return std::span(sum_).subspan(1, entries_);
  }
  void clear() noexcept;

  /// Calls visit(j, sum of entry j) for each, ascending; empties the sum.
  template <class Visit>
  void drain(const Visit& visit) noexcept {
    std::array<std::uint64_t, kTileElements / kWordBits> touched{};
    for (const std::uint16_t j : index()) {
      touched[j / kWordBits] |= std::uint64_t{1} << (j % kWordBits);
    }
    for (std::size_t word = 0; word < touched.size(); ++word) {
      for (std::uint64_t left = touched[word]; left != 0; left &= left - 1) {
        const std::size_t j = word * kWordBits + static_cast<std::size_t>(std::countr_zero(left));
        visit(j, sum_[place_[j]]);
      }
    }
    clear();
  }

 private:
  static constexpr std::size_t kWordBits = 64;
  std::array<std::uint16_t, kTileElements> place_{};  ///< In the lists, from 1 on; 0: in none.
  std::size_t entries_ = 0;
  // From 1 on, and one more than there can be: there goes an entry that is in the list already.
  std::array<std::uint16_t, kTileElements + 2> index_;
  std::array<float, kTileElements + 2> sum_;
};

}  // namespace distro::kernels
