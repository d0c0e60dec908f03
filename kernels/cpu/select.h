#pragma once

#include <cstddef>
#include <cstdint>

/// The part of select() that works on few elements, compiled once for the baseline CPU. Magnitudes
/// are the bits of |r| as integers, which order as the values do.
namespace distro::kernels {

/// The k-th largest of n values, 1 <= k <= n. Reorders them.
std::int32_t kth_largest(std::int32_t* values, std::size_t n, std::size_t k) noexcept;

/// Of c ascending candidates (index and magnitude, all magnitudes > 0), write the indices of the k
/// largest, ties to the lowest index, ascending, to `index`. Returns how many: min(c, k).
std::size_t choose(const std::uint16_t* candidate, const std::int32_t* magnitude, std::size_t c,
                   std::size_t k, std::uint16_t* index) noexcept;

}  // namespace distro::kernels
