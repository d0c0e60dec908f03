#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <numeric>
#include <random>
#include <vector>

#include "inverse.h"
#include "isas.h"
#include "kernels/dct_basis.h"
#include "kernels/kernels.h"

namespace distro::kernels {
namespace {

using Values = std::vector<float>;
using Doubles = std::vector<double>;

struct Shape {
  std::size_t rows;
  std::size_t columns;
};

/// Every side, and shapes that are far from square.
std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (std::size_t side = 1; side <= kLargestSide; ++side) {
    all.push_back({side, side});
    all.push_back({side, 1 + (side * 37) % kLargestSide});
    all.push_back({1 + (side * 29) % kLargestSide, side});
  }
  for (const std::size_t side : {1U, 2U, 3U, 17U, 33U, 63U, 64U}) {
    all.push_back({side, kLargestSide});
    all.push_back({kLargestSide, side});
    all.push_back({1, side});
    all.push_back({side, 1});
  }
  return all;
}

Values random_block(Shape shape, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Values block(shape.rows * shape.columns);
  for (float& value : block) {
    value = normal(random);
  }
  return block;
}

Values transformed(Isa isa, const Values& block, Shape shape) {
  Values coefficients(block.size());
  table(isa).dct(block.data(), shape.columns, coefficients.data(), shape.rows, shape.columns);
  return coefficients;
}

Values restored(Isa isa, const Values& coefficients, Shape shape) {
  return inverse_dct(table(isa), coefficients, shape.rows, shape.columns);
}

/// The definition, in double.
double basis(std::size_t side, std::size_t frequency, std::size_t i) {
  const double scale = std::sqrt((frequency == 0 ? 1.0 : 2.0) / static_cast<double>(side));
  return scale * std::cos(std::numbers::pi * static_cast<double>((2 * i + 1) * frequency) /
                          static_cast<double>(2 * side));
}

Doubles reference_dct(const Values& block, Shape shape) {
  const auto [rows, columns] = shape;
  Doubles half(rows * columns);  // rows transformed: half[u][c]
  for (std::size_t u = 0; u < rows; ++u) {
    for (std::size_t r = 0; r < rows; ++r) {
      const double factor = basis(rows, u, r);
      for (std::size_t c = 0; c < columns; ++c) {
        half[u * columns + c] += factor * static_cast<double>(block[r * columns + c]);
      }
    }
  }
  Doubles coefficients(rows * columns);
  for (std::size_t v = 0; v < columns; ++v) {
    for (std::size_t c = 0; c < columns; ++c) {
      const double factor = basis(columns, v, c);
      for (std::size_t u = 0; u < rows; ++u) {
        coefficients[v * rows + u] += factor * half[u * columns + c];
      }
    }
  }
  return coefficients;
}

double largest_error(const Values& values, const auto& expected) {
  double error = 0.0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    error = std::max(error,
                     std::abs(static_cast<double>(values[i]) - static_cast<double>(expected[i])));
  }
  return error;
}

bool same_bits(const Values& a, const Values& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
    return std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(y);
  });
}

TEST(Dct, IsTheDefinition) {
  for (const Shape shape : shapes()) {
    const Values block = random_block(shape, 1);
    // Values are about 1, also after an orthonormal transform.
    EXPECT_LT(largest_error(transformed(best_isa(), block, shape), reference_dct(block, shape)),
              4e-6)
        << shape.rows << " x " << shape.columns;
  }
}

TEST(Dct, InverseBringsBack) {
  for (const Shape shape : shapes()) {
    const Values block = random_block(shape, 2);
    const Values coefficients = transformed(best_isa(), block, shape);
    EXPECT_LT(largest_error(restored(best_isa(), coefficients, shape), block), 4e-6)
        << shape.rows << " x " << shape.columns;
  }
}

// Two values of each of some row frequencies, to where these are many and one fewer.
TEST(Dct, InverseOfSomeRowFrequenciesBringsThemBack) {
  for (const Shape shape : {Shape{64, 64}, Shape{64, 17}, Shape{32, 64}, Shape{32, 20}}) {
    std::mt19937 random(8);
    std::vector<std::size_t> frequencies(shape.rows);
    std::iota(frequencies.begin(), frequencies.end(), std::size_t{0});
    for (const std::size_t count :
         {std::size_t{1}, shape.rows / 3, shape.rows / 3 + 1, shape.rows - 1}) {
      std::shuffle(frequencies.begin(), frequencies.end(), random);
      Values coefficients(shape.rows * shape.columns);
      for (std::size_t i = 0; i < count; ++i) {
        coefficients[random() % shape.columns * shape.rows + frequencies[i]] += 1.0F;
        coefficients[random() % shape.columns * shape.rows + frequencies[i]] -= 0.5F;
      }
      const Values block = restored(best_isa(), coefficients, shape);
      EXPECT_LT(largest_error(coefficients, reference_dct(block, shape)), 4e-6)
          << shape.rows << " x " << shape.columns << ", " << count << " row frequencies";
      for (const Isa isa : isas()) {
        EXPECT_TRUE(same_bits(restored(isa, coefficients, shape), block));
      }
    }
  }
}

TEST(Dct, KeepsLengthsAndAngles) {
  const Shape shape{64, 48};
  const Values a = random_block(shape, 3);
  const Values b = random_block(shape, 4);
  const auto dot = [](const Values& x, const Values& y) {
    double sum = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
    }
    return sum;
  };
  const Values ta = transformed(best_isa(), a, shape);
  const Values tb = transformed(best_isa(), b, shape);
  EXPECT_NEAR(dot(ta, ta) / dot(a, a), 1.0, 1e-6);
  EXPECT_NEAR(dot(ta, tb), dot(a, b), 1e-6 * dot(a, a));
}

TEST(Dct, EveryInstructionSetHasTheSameBits) {
  for (const Shape shape : shapes()) {
    const Values block = random_block(shape, 5);
    const Values coefficients = transformed(Isa::scalar, block, shape);
    const Values back = restored(Isa::scalar, coefficients, shape);
    for (const Isa isa : isas()) {
      EXPECT_TRUE(same_bits(transformed(isa, block, shape), coefficients))
          << shape.rows << " x " << shape.columns;
      EXPECT_TRUE(same_bits(restored(isa, coefficients, shape), back))
          << shape.rows << " x " << shape.columns;
    }
  }
}

TEST(Dct, CoefficientsThatAreLeftOutAreZeros) {
  for (const Shape shape : {Shape{64, 64}, Shape{64, 17}, Shape{12, 64}, Shape{31, 48}}) {
    std::mt19937 random(6);
    for (const std::size_t entries : {0U, 1U, 3U, 6U, 40U}) {
      Values coefficients(shape.rows * shape.columns);
      for (std::size_t i = 0; i < entries; ++i) {
        coefficients[random() % coefficients.size()] = 1.0F + static_cast<float>(random() % 100);
      }
      std::vector<std::uint16_t> all(coefficients.size());
      std::iota(all.begin(), all.end(), std::uint16_t{0});
      Values expected(coefficients.size());
      for (const Isa isa : isas()) {
        table(isa).inverse_dct(all.data(), coefficients.data(), all.size(), expected.data(),
                               shape.rows, shape.columns);
        EXPECT_EQ(restored(isa, coefficients, shape), expected);
      }
    }
  }
}

TEST(Dct, ReadsRowsThatAreApart) {
  const Shape shape{64, 50};
  constexpr std::size_t kStride = 83;
  const Values matrix = random_block({shape.rows, kStride}, 7);
  for (const std::size_t columns : {std::size_t{50}, kLargestSide}) {
    Values block;
    for (std::size_t row = 0; row < shape.rows; ++row) {
      const auto first = matrix.begin() + static_cast<std::ptrdiff_t>(row * kStride);
      block.insert(block.end(), first, first + static_cast<std::ptrdiff_t>(columns));
    }
    for (const Isa isa : isas()) {
      Values got(block.size());
      table(isa).dct(matrix.data(), kStride, got.data(), shape.rows, columns);
      EXPECT_TRUE(same_bits(got, transformed(isa, block, {shape.rows, columns})));
    }
  }
}

TEST(DctBasis, FactorsAreCorrectlyRounded) {
  for (std::size_t side = 1; side <= kLargestSide; ++side) {
    const float* factor = dct_tables().basis[side];
    const auto expect = [&](std::size_t angle, std::size_t m, bool first) {
      const long double pi = std::numbers::pi_v<long double>;
      const long double scale = std::sqrt((first ? 1.0L : 2.0L) / static_cast<long double>(side));
      const bool zero = angle % (2 * m) == m;  // which std::cos misses by 1e-20
      const long double turn =
          static_cast<long double>(angle % (4 * m)) / static_cast<long double>(2 * m);
      const long double exact = zero ? 0.0L : scale * std::cos(pi * turn);
      ASSERT_EQ(*factor++, static_cast<float>(exact)) << "side " << side << " angle " << angle;
    };
    std::size_t m = side;
    for (; m % 2 == 0; m /= 2) {
      for (std::size_t k = 0; k < m / 2; ++k) {
        for (std::size_t i = 0; i < m / 2; ++i) {
          expect((2 * i + 1) * (2 * k + 1), m, false);
        }
      }
    }
    for (std::size_t k = 0; k < m; ++k) {
      for (std::size_t i = 0; i < m; ++i) {
        expect((2 * i + 1) * k, m, k == 0);
      }
    }
    factor = dct_tables().rows[side];
    for (std::size_t k = 0; k < side; ++k) {
      for (std::size_t i = 0; i < side; ++i) {
        expect((2 * i + 1) * k, side, k == 0);
      }
    }
  }
}

}  // namespace
}  // namespace distro::kernels
