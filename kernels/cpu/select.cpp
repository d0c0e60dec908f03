#include "kernels/cpu/select.h"

#include <algorithm>
#include <array>
#include <functional>

#include "kernels/kernels.h"

namespace distro::kernels {
namespace {

/// Up to here a sorted list with insertion beats nth_element.
constexpr std::size_t kFewest = 12;

}  // namespace

std::int32_t kth_largest(std::int32_t* values, std::size_t n, std::size_t k) noexcept {
  if (k > kFewest) {
    std::nth_element(values, values + (k - 1), values + n, std::greater<>());
    return values[k - 1];
  }
  std::array<std::int32_t, kFewest> largest;  // descending
  largest.fill(-1);
  for (std::size_t i = 0; i < n; ++i) {
    const std::int32_t value = values[i];
    if (value <= largest[k - 1]) {
      continue;
    }
    std::size_t at = k - 1;
    for (; at > 0 && largest[at - 1] < value; --at) {
      largest[at] = largest[at - 1];
    }
    largest[at] = value;
  }
  return largest[k - 1];
}

std::size_t choose(const std::uint16_t* candidate, const std::int32_t* magnitude, std::size_t c,
                   std::size_t k, std::uint16_t* index) noexcept {
  if (c <= k) {
    std::copy_n(candidate, c, index);
    return c;
  }
  std::array<std::int32_t, kTileElements> scratch;
  std::copy_n(magnitude, c, scratch.begin());
  const std::int32_t threshold = kth_largest(scratch.data(), c, k);
  const auto larger = static_cast<std::size_t>(
      std::count_if(magnitude, magnitude + c, [=](std::int32_t m) { return m > threshold; }));
  std::size_t ties = k - larger;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < c; ++i) {
    if (magnitude[i] > threshold) {
      index[kept++] = candidate[i];
    } else if (magnitude[i] == threshold && ties > 0) {
      index[kept++] = candidate[i];
      --ties;
    }
  }
  return kept;
}

}  // namespace distro::kernels
