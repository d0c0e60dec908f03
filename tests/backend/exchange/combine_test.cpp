#include "backend/exchange/combine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/half.h"

namespace distro::exchange {
namespace {

template <typename T>
std::vector<T> combined(ElementType type, Combiner combiner,
                        const std::vector<std::vector<T>>& sources) {
  std::vector<const std::byte*> bytes;
  for (const auto& source : sources) {
    bytes.push_back(reinterpret_cast<const std::byte*>(source.data()));
  }
  std::vector<T> result(sources.front().size());
  combine(type, combiner, bytes, result.size(), reinterpret_cast<std::byte*>(result.data()));
  return result;
}

using Floats = std::vector<float>;

TEST(Combine, AddsInTheOrderOfTheSources) {
  // Any other order rounds otherwise.
  EXPECT_EQ(combined<float>(ElementType::f32, Combiner::sum, {{1e8F}, {1.0F}, {-1e8F}, {1.0F}}),
            Floats{1.0F});
  EXPECT_EQ(combined<float>(ElementType::f32, Combiner::product, {{3.0F}, {-2.0F}}), Floats{-6.0F});
  EXPECT_EQ(combined<double>(ElementType::f64, Combiner::sum, {{0.5}, {0.25}}),
            std::vector<double>{0.75});
}

TEST(Combine, KeepsNaNInMinAndMax) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Combiner combiner : {Combiner::min, Combiner::max}) {
    const auto result =
        combined<float>(ElementType::f32, combiner, {{nan, 1.0F, 3.0F}, {1.0F, nan, 2.0F}});
    EXPECT_TRUE(std::isnan(result[0]) && std::isnan(result[1]));
    EXPECT_EQ(result[2], combiner == Combiner::min ? 2.0F : 3.0F);
  }
}

TEST(Combine, RoundsSixteenBitsOnce) {
  // 2048 + 1 rounds to 2048 in f16: added one by one, the ones would be lost.
  const auto half = [](float value) { return kernels::to_f16(value); };
  const auto brain = [](float value) { return kernels::to_bf16(value); };
  using Bits = std::vector<std::uint16_t>;
  EXPECT_EQ(combined<std::uint16_t>(ElementType::f16, Combiner::sum,
                                    {{half(2048)}, {half(1)}, {half(1)}}),
            Bits{half(2050)});
  EXPECT_EQ(combined<std::uint16_t>(ElementType::bf16, Combiner::sum,
                                    {{brain(256)}, {brain(1)}, {brain(1)}}),
            Bits{brain(258)});
}

TEST(Combine, IntegersWrapAround) {
  EXPECT_EQ(combined<std::int32_t>(ElementType::i32, Combiner::sum, {{2147483647}, {1}}),
            std::vector<std::int32_t>{std::numeric_limits<std::int32_t>::min()});
  EXPECT_EQ(combined<std::uint16_t>(ElementType::u16, Combiner::product, {{65535}, {65535}}),
            std::vector<std::uint16_t>{1});
  EXPECT_EQ(combined<std::int8_t>(ElementType::i8, Combiner::sum, {{-100}, {-100}}),
            std::vector<std::int8_t>{56});
  EXPECT_EQ(combined<std::int64_t>(ElementType::i64, Combiner::min, {{-5}, {3}}),
            std::vector<std::int64_t>{-5});
  EXPECT_EQ(combined<std::uint64_t>(ElementType::u64, Combiner::max, {{~0ULL}, {3}}),
            std::vector<std::uint64_t>{~0ULL});
}

TEST(Combine, Bits) {
  using Bytes = std::vector<std::uint8_t>;
  const std::vector<Bytes> sources = {{0b1100}, {0b1010}};
  EXPECT_EQ(combined<std::uint8_t>(ElementType::u8, Combiner::bit_and, sources), Bytes{0b1000});
  EXPECT_EQ(combined<std::uint8_t>(ElementType::u8, Combiner::bit_or, sources), Bytes{0b1110});
  EXPECT_EQ(combined<std::uint8_t>(ElementType::u8, Combiner::bit_xor, sources), Bytes{0b0110});
}

TEST(Combine, Booleans) {
  using Bytes = std::vector<std::uint8_t>;
  const std::vector<Bytes> sources = {{0, 0, 1, 1}, {0, 1, 0, 1}};
  const Bytes all = {0, 0, 0, 1};
  const Bytes any = {0, 1, 1, 1};
  const Bytes odd = {0, 1, 1, 0};
  for (const auto& [combiner, expected] : {std::pair{Combiner::sum, any},
                                           {Combiner::product, all},
                                           {Combiner::min, all},
                                           {Combiner::max, any},
                                           {Combiner::bit_and, all},
                                           {Combiner::bit_or, any},
                                           {Combiner::bit_xor, odd}}) {
    EXPECT_EQ(combined<std::uint8_t>(ElementType::boolean, combiner, sources), expected)
        << name_of(combiner);
  }
}

TEST(Combine, ComplexNumbersHaveNoOrder) {
  using Complex = std::complex<float>;
  EXPECT_EQ(combined<Complex>(ElementType::c64, Combiner::product, {{{0, 1}}, {{0, 1}}}),
            std::vector<Complex>{Complex(-1, 0)});
  EXPECT_FALSE(can_combine(ElementType::c64, Combiner::max));
  EXPECT_FALSE(can_combine(ElementType::f32, Combiner::bit_and));
  EXPECT_FALSE(can_combine(ElementType::opaque, Combiner::sum));
  EXPECT_FALSE(can_combine(ElementType::i32, Combiner::none));
}

TEST(Combine, MoreThanABlockInPlaceAndWithoutAlignment) {
  constexpr std::size_t kElements = 5000;
  std::vector<std::byte> a(kElements * 4 + 1);
  std::vector<float> b(kElements, 2.0F);
  for (std::size_t i = 0; i < kElements; ++i) {
    const auto value = static_cast<float>(i);
    std::memcpy(a.data() + 1 + 4 * i, &value, sizeof value);
  }
  const std::vector<const std::byte*> sources = {a.data() + 1,
                                                 reinterpret_cast<const std::byte*>(b.data())};
  combine(ElementType::f32, Combiner::sum, sources, kElements, a.data() + 1);
  for (std::size_t i = 0; i < kElements; ++i) {
    float value = 0;
    std::memcpy(&value, a.data() + 1 + 4 * i, sizeof value);
    ASSERT_EQ(value, static_cast<float>(i) + 2.0F);
  }
}

}  // namespace
}  // namespace distro::exchange
