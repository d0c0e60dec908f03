#pragma once

#include <cstddef>

namespace distro::kernels {

/// Sides of a block that the transform knows: 1 to this.
inline constexpr std::size_t kLargestSide = 64;

/// Whether a DCT-IV of this power of two is computed by rotations and two DCT-II of half the side.
[[nodiscard]] static constexpr bool has_rotations(std::size_t side) noexcept { return side >= 8; }

/// Where the values of each side, 1 to kLargestSide, begin.
///
/// The same bits on every machine: computed in double by additions, multiplications, divisions and
/// square roots in a fixed order, which IEEE 754 rounds alike everywhere, and not by a library's
/// cosine, which it does not.
struct DctTables {
  /// The factors of the orthonormal DCT-II, by its even-odd split: the even outputs of a DCT-II of
  /// even side m are the DCT-II of side m/2 of x[i] + x[m-1-i]; the odd ones are the DCT-IV of side
  /// m/2 of x[i] - x[m-1-i]. So for m = side, side/2, ... while m is even: the h x h factors of the
  /// odd outputs, h = m/2, factor[k * h + i] = s cos(pi (2i+1) (2k+1) / 2m), symmetric; then for
  /// the odd m that is left: the m x m factors of the whole DCT-II, factor[k * m + i] = s cos(pi
  /// (2i+1) k / 2m), row 0 divided by sqrt 2. s = sqrt(2 / side).
  const float* basis[kLargestSide + 1];

  /// The rows of the orthonormal DCT-II, whole: that of frequency k begins at k * side, row[i] = s
  /// cos(pi (2i+1) k / (2 side)), row 0 divided by sqrt 2.
  const float* rows[kLargestSide + 1];

  /// The rotations of the DCT-IV in a DCT-II of this side, a power of two: for m = side, side/2,
  /// ... while m is even and has_rotations(h), h = m/2: for i below h/2 the pair s cos(pi (2i+1) /
  /// 4h), s sin(the same), s = sqrt(h / 2 side), so that two orthonormal DCT-II of side h/2 follow.
  const float* rotations[kLargestSide + 1];
};

/// Computed at the first call (610 KB); any thread. Code between vectors that are in registers asks
/// once: a call does not keep them there.
[[nodiscard]] const DctTables& dct_tables() noexcept;

}  // namespace distro::kernels
