#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/kernels.h"

namespace distro::kernels {

/// An entry of the reference after an exchange: the one place that says with which operations.
[[nodiscard]] inline float moved(float before, float gain, float sum) noexcept {
  return before + gain * sum;
}

/// The weighted sum of sparse entries in one tile, in fp32 and in the order of the calls. 16.5 KiB,
/// for the stack; empty after construction, move_into(),
/// take() and drain().
class SparseSum {
 public:
  SparseSum() noexcept = default;

  /// sum[index[i]] += weight * value[i], for each i in order. Indices below kTileElements.
  void add(float weight, std::span<const std::uint16_t> index,
           std::span<const float> value) noexcept;

  /// Which entries were touched: bit j % 64 of word j / 64.
  using Touched = std::array<std::uint64_t, kTileElements / 64>;
  [[nodiscard]] const Touched& touched() const noexcept { return touched_; }

  /// w[j] += gain * sum[j] at every entry that was touched, ascending; empties the sum. Returns
  /// what this adds to the checksum of w, whose entry 0 has the checksum index `first`. Every
  /// touched entry must lie inside w.
  std::uint64_t move_into(float* w, float gain, std::uint64_t first) noexcept;

  /// The same, and pending[j] += held * sum[j].
  std::uint64_t move_into(float* w, float gain, std::uint64_t first, float* pending,
                          float held) noexcept;

  /// The entries that were touched, ascending, into index and value (room for all that may be);
  /// empties the sum. Returns how many.
  std::size_t take(std::uint16_t* index, float* value) noexcept;

  /// Calls visit(j, sum[j]) for every entry that was touched, ascending; empties the sum.
  template <class Visit>
  void drain(const Visit& visit) noexcept {
    for (std::size_t word = 0; word < touched_.size(); ++word) {
      for (std::uint64_t left = touched_[word]; left != 0; left &= left - 1) {
        const std::size_t j = word * kWordBits + static_cast<std::size_t>(std::countr_zero(left));
        visit(j, sum_[j]);
        sum_[j] = 0.0F;
      }
      touched_[word] = 0;
    }
  }

 private:
  static constexpr std::size_t kWordBits = 64;
  std::array<float, kTileElements> sum_{};
  Touched touched_{};
};

}  // namespace distro::kernels
