#include "kernels/dct_basis.h"

#include <array>
#include <bit>
#include <cmath>
#include <numbers>

namespace distro::kernels {
namespace {

/// cos(x) or sin(x) for 0 <= x <= pi/4, by their Taylor series, which fall below 2^-60 within these
/// terms.
double series(double x, bool sine) noexcept {
  constexpr int kTerms = 11;
  const double square = x * x;
  const int shift = sine ? 1 : 0;
  double sum = 1.0;
  for (int term = kTerms; term > 0; --term) {
    const int last = 2 * term + shift;
    sum = 1.0 - sum * square / static_cast<double>(last * (last - 1));
  }
  return sine ? sum * x : sum;
}

/// cos(pi p / 2n), the angle brought to the first eighth of the circle in integers.
double cosine(std::size_t p, std::size_t n) noexcept {
  p %= 4 * n;
  if (p > 2 * n) {
    p = 4 * n - p;
  }
  const bool negative = p > n;
  if (negative) {
    p = 2 * n - p;
  }
  const bool sine = 2 * p > n;
  const std::size_t q = sine ? n - p : p;
  const double x = std::numbers::pi * static_cast<double>(q) / static_cast<double>(2 * n);
  const double value = series(x, sine);
  return negative ? -value : value;
}

/// Number of factors of one side.
constexpr std::size_t factors(std::size_t side) noexcept {
  std::size_t count = 0;
  for (; side % 2 == 0; side /= 2) {
    count += side / 2 * (side / 2);
  }
  return count + side * side;
}

/// Number of values of one side's whole rows.
constexpr std::size_t whole_rows(std::size_t side) noexcept { return side * side; }

/// Number of values of one side's rotations.
constexpr std::size_t rotations(std::size_t side) noexcept {
  std::size_t count = 0;
  for (; std::has_single_bit(side) && has_rotations(side / 2); side /= 2) {
    count += side / 2;
  }
  return count;
}

constexpr std::size_t of_all_sides(std::size_t (*of_one)(std::size_t side) noexcept) noexcept {
  std::size_t count = 0;
  for (std::size_t side = 1; side <= kLargestSide; ++side) {
    count += of_one(side);
  }
  return count;
}

struct Bases {
  Bases() noexcept {
    float* next = factor.data();
    float* next_row = row.data();
    float* next_rotation = rotation.data();
    for (std::size_t side = 1; side <= kLargestSide; ++side) {
      tables.basis[side] = next;
      next = fill(next, side);
      tables.rows[side] = next_row;
      next_row = fill_dct(next_row, side, side);
      tables.rotations[side] = next_rotation;
      next_rotation = fill_rotations(next_rotation, side);
    }
  }

  static float* fill_rotations(float* next, std::size_t side) noexcept {
    for (std::size_t m = side; std::has_single_bit(m) && has_rotations(m / 2); m /= 2) {
      const std::size_t h = m / 2;
      const double scale = std::sqrt(static_cast<double>(h) / static_cast<double>(2 * side));
      for (std::size_t i = 0; i < h / 2; ++i) {
        *next++ = static_cast<float>(scale * cosine(2 * i + 1, 2 * h));
        *next++ = static_cast<float>(scale * cosine(2 * h - (2 * i + 1), 2 * h));
      }
    }
    return next;
  }

  static float* fill(float* next, std::size_t side) noexcept {
    const double scale = std::sqrt(2.0 / static_cast<double>(side));
    std::size_t m = side;
    for (; m % 2 == 0; m /= 2) {
      for (std::size_t k = 0; k < m / 2; ++k) {
        for (std::size_t i = 0; i < m / 2; ++i) {
          *next++ = static_cast<float>(scale * cosine((2 * i + 1) * (2 * k + 1), m));
        }
      }
    }
    return fill_dct(next, side, m);
  }

  // The DCT-II of side m, scaled as a part of that of `side`.
  static float* fill_dct(float* next, std::size_t side, std::size_t m) noexcept {
    const double scale = std::sqrt(2.0 / static_cast<double>(side));
    const double mean = std::sqrt(1.0 / static_cast<double>(side));
    for (std::size_t k = 0; k < m; ++k) {
      for (std::size_t i = 0; i < m; ++i) {
        *next++ = static_cast<float>(k == 0 ? mean : scale * cosine((2 * i + 1) * k, m));
      }
    }
    return next;
  }

  std::array<float, of_all_sides(factors)> factor{};
  std::array<float, of_all_sides(whole_rows)> row{};
  std::array<float, of_all_sides(rotations)> rotation{};
  DctTables tables{};
};

}  // namespace

const DctTables& dct_tables() noexcept {
  static const Bases kBases;
  return kBases.tables;
}

}  // namespace distro::kernels
