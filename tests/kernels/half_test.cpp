#include "kernels/half.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>

namespace distro::kernels {
namespace {

/// The value of a 16-bit float, from the definition.
double value_of(std::uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) {
    return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  }
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

struct Format {
  const char* name;
  int exponent_bits;
  int mantissa_bits;
  std::uint16_t (*to)(float) noexcept;
  float (*from)(std::uint16_t) noexcept;
};

class Half : public testing::TestWithParam<Format> {};

TEST_P(Half, EveryValueIsReadExactly) {
  const Format format = GetParam();
  for (std::uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const double expected = value_of(half, format.exponent_bits, format.mantissa_bits);
    const float value = format.from(half);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << bits;
      ASSERT_TRUE(std::isnan(format.from(format.to(value)))) << bits;
      ASSERT_EQ(std::signbit(value), (bits & 0x8000) != 0);
      continue;
    }
    ASSERT_EQ(static_cast<double>(value), expected) << bits;
    ASSERT_EQ(std::signbit(value), (bits & 0x8000) != 0);
    ASSERT_EQ(format.to(value), half) << bits;
  }
}

TEST_P(Half, RoundsToNearestEvenBetweenAllNeighbours) {
  const Format format = GetParam();
  const auto infinity =
      static_cast<std::uint16_t>(((1 << format.exponent_bits) - 1) << format.mantissa_bits);
  for (std::uint32_t bits = 0; bits < infinity; ++bits) {
    const auto low = static_cast<std::uint16_t>(bits);
    const auto high = static_cast<std::uint16_t>(bits + 1);
    const auto even = (low & 1) == 0 ? low : high;
    const double below = value_of(low, format.exponent_bits, format.mantissa_bits);
    // Beyond the largest value, rounding goes by the value that the next would have.
    const double step = below - value_of(static_cast<std::uint16_t>(bits - 1), format.exponent_bits,
                                         format.mantissa_bits);
    const double above = high == infinity
                             ? below + step
                             : value_of(high, format.exponent_bits, format.mantissa_bits);
    const auto half = static_cast<float>((below + above) / 2);
    ASSERT_EQ(static_cast<double>(half), (below + above) / 2);
    const float less = std::nextafter(half, 0.0F);
    const float more = std::nextafter(half, std::numeric_limits<float>::infinity());
    ASSERT_EQ(format.to(less), low) << bits;
    ASSERT_EQ(format.to(half), even) << bits;
    ASSERT_EQ(format.to(more), high) << bits;
    ASSERT_EQ(format.to(-less), low | 0x8000) << bits;
    ASSERT_EQ(format.to(-half), even | 0x8000) << bits;
    ASSERT_EQ(format.to(-more), high | 0x8000) << bits;
  }
}

TEST_P(Half, ExtremesAndNaN) {
  const Format format = GetParam();
  const auto infinity =
      static_cast<std::uint16_t>(((1 << format.exponent_bits) - 1) << format.mantissa_bits);
  EXPECT_EQ(format.to(std::numeric_limits<float>::infinity()), infinity);
  EXPECT_EQ(format.to(-std::numeric_limits<float>::infinity()), infinity | 0x8000);
  EXPECT_EQ(format.to(std::numeric_limits<float>::max()), infinity);
  EXPECT_EQ(format.to(0.0F), 0);
  EXPECT_EQ(format.to(-0.0F), 0x8000);
  for (const std::uint32_t payload : {1U, 0x1fffU, 0x2000U, 0x3fffffU, 0x400000U, 0x7fffffU}) {
    for (const std::uint32_t sign : {0U, 0x80000000U}) {
      const auto nan = std::bit_cast<float>(sign | 0x7f800000U | payload);
      EXPECT_TRUE(std::isnan(format.from(format.to(nan)))) << payload;
    }
  }
  if (format.exponent_bits == 5) {
    EXPECT_EQ(format.to(std::numeric_limits<float>::denorm_min()), 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, Half,
                         testing::Values(Format{"f16", 5, 10, to_f16, from_f16},
                                         Format{"bf16", 8, 7, to_bf16, from_bf16}),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace distro::kernels
