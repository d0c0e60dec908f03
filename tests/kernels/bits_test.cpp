#include "kernels/bits.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

namespace distro::kernels {
namespace {

TEST(Bits, FieldsComeBack) {
  std::mt19937 random(1);
  std::vector<std::pair<std::uint32_t, unsigned>> fields;
  std::size_t bits = 0;
  for (int i = 0; i < 5000; ++i) {
    const auto width = static_cast<unsigned>(random() % 33);
    fields.emplace_back(width == 0 ? 0 : static_cast<std::uint32_t>(random()) >> (32 - width),
                        width);
    bits += width;
  }
  std::vector<std::byte> memory((bits + 7) / 8);  // exactly enough
  BitWriter writer(memory);
  for (const auto& [value, width] : fields) {
    writer.put(value, width);
  }
  EXPECT_EQ(writer.bits(), bits);
  EXPECT_EQ(writer.finish(), memory.size());
  EXPECT_FALSE(writer.overflowed());

  BitReader reader(memory);
  for (const auto& [value, width] : fields) {
    ASSERT_EQ(reader.get(width), value);
  }
  EXPECT_FALSE(reader.overrun());
  EXPECT_LT(reader.remaining(), 8U);
}

TEST(Bits, AppendMakesOneStreamOfMany) {
  std::vector<std::byte> first(64);
  std::vector<std::byte> second(64);
  BitWriter a(first);
  BitWriter b(second);
  for (std::uint32_t i = 0; i < 70; ++i) {
    a.put(i % 8, 3);
    b.put(i % 32, 5);
  }
  const std::size_t a_bits = a.bits();
  const std::size_t b_bits = b.bits();
  a.finish();
  b.finish();
  std::vector<std::byte> whole(128);
  BitWriter writer(whole);
  writer.append(first, a_bits);
  writer.append(second, b_bits);
  writer.finish();
  BitReader reader(whole);
  for (std::uint32_t i = 0; i < 70; ++i) {
    ASSERT_EQ(reader.get(3), i % 8);
  }
  for (std::uint32_t i = 0; i < 70; ++i) {
    ASSERT_EQ(reader.get(5), i % 32);
  }
}

TEST(Bits, WriterStopsAtItsEnd) {
  std::vector<std::byte> memory(7, std::byte{0x55});
  BitWriter writer(std::span<std::byte>(memory).first(6));
  for (int i = 0; i < 7; ++i) {
    writer.put(0xff, 8);
  }
  writer.finish();
  EXPECT_TRUE(writer.overflowed());
  EXPECT_EQ(memory[6], std::byte{0x55});
}

TEST(Bits, ReaderYieldsZerosPastItsEnd) {
  const std::vector<std::byte> ones(9, std::byte{0xff});
  BitReader reader(ones);
  EXPECT_EQ(reader.get_unary(), 72U);
  EXPECT_TRUE(reader.overrun());
  EXPECT_EQ(reader.get(32), 0U);
  BitReader nothing{std::span<const std::byte>()};
  EXPECT_EQ(nothing.get(0), 0U);
  EXPECT_FALSE(nothing.overrun());
  EXPECT_EQ(nothing.get(1), 0U);
  EXPECT_TRUE(nothing.overrun());
}

TEST(Rice, ParameterIsNearTheBest) {
  for (const std::size_t count : {1U, 6U, 8U, 16U, 64U, 512U, 3000U, 4095U}) {
    const double mean = static_cast<double>(4096 - count) / static_cast<double>(count + 1);
    const double theta = mean / (mean + 1);
    const auto cost = [&](unsigned r) {
      const double power = std::pow(theta, std::exp2(r));
      return 1 + r + power / (1 - power);
    };
    const unsigned r = rice_parameter(4096, count);
    for (unsigned other = 0; other < 13; ++other) {
      EXPECT_LE(cost(r), cost(other) * 1.001) << "count " << count << " r " << r << " " << other;
    }
  }
}

TEST(Rice, GapsComeBackForRandomAndExtremePositions) {
  std::mt19937 random(2);
  for (const std::size_t n : {1U, 2U, 63U, 700U, 4095U, 4096U}) {
    for (int round = 0; round < 60; ++round) {
      std::vector<std::uint16_t> all(n);
      std::iota(all.begin(), all.end(), std::uint16_t{0});
      const std::size_t count = round == 0 ? n - 1 : random() % n;
      if (round % 3 == 0) {
        std::rotate(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(count), all.end());
      } else if (round % 3 == 1) {
        std::shuffle(all.begin(), all.end(), random);
      }
      all.resize(count);
      std::sort(all.begin(), all.end());
      std::vector<std::byte> memory((largest_gaps_bits(n, count) + 7) / 8);
      BitWriter writer(memory);
      writer.write_gaps(all, n);
      writer.finish();
      ASSERT_FALSE(writer.overflowed()) << n << " " << count;
      std::vector<std::uint16_t> back(count);
      BitReader reader(memory);
      ASSERT_TRUE(reader.read_gaps(back, n));
      ASSERT_EQ(back, all);
    }
  }
}

TEST(Rice, PositionsOutsideAreRefused) {
  std::vector<std::byte> memory(64);
  BitWriter writer(memory);
  const std::vector<std::uint16_t> positions{3, 99};
  writer.write_gaps(positions, 100);
  writer.finish();
  std::vector<std::uint16_t> back(2);
  EXPECT_TRUE(BitReader(memory).read_gaps(back, 100));
  // The same parameter, one element fewer.
  ASSERT_EQ(rice_parameter(100, 2), rice_parameter(99, 2));
  EXPECT_FALSE(BitReader(memory).read_gaps(back, 99));
}

}  // namespace
}  // namespace distro::kernels
