#include "kernels/sparse_sum.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <utility>
#include <vector>

namespace distro::kernels {
namespace {

TEST(SparseSum, AddsInOrderWhatMovesTheReference) {
  constexpr std::uint32_t kSeed = 5;
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  std::mt19937 random(kSeed);
  std::normal_distribution<float> normal;
  SparseSum sum;
  for (int round = 0; round < 20; ++round) {
    const std::size_t n = round % 2 == 0 ? 4096 : 100;
    std::vector<float> w(n);
    for (float& value : w) {
      value = normal(random);
    }
    std::vector<float> dense(n);
    std::vector<float> expected = w;
    std::set<std::uint16_t> touched;
    // From all entries of a tile, each by all, to a few.
    const std::size_t most_gap = round < 2 ? 1 : 40;
    for (const float weight : {0.25F, 0.7F, 0.05F}) {
      std::vector<std::uint16_t> index;
      std::vector<float> value;
      for (std::size_t i = random() % most_gap; i < n; i += 1 + random() % most_gap) {
        index.push_back(static_cast<std::uint16_t>(i));
        value.push_back(normal(random));
        dense[i] += weight * value.back();
        touched.insert(index.back());
      }
      sum.add(weight, index, value);
    }
    for (std::size_t i = 0; i < n; ++i) {
      expected[i] += 2.0F * dense[i];
    }
    ASSERT_EQ(sum.index().size(), touched.size());
    EXPECT_EQ(std::set(sum.index().begin(), sum.index().end()), touched);
    for (std::size_t i = 0; i < touched.size(); ++i) {
      const std::uint16_t j = sum.index()[i];
      ASSERT_EQ(sum.sum()[i], dense[j]);
      ASSERT_EQ(moved(w[j], 2.0F, dense[j]), expected[j]);
    }
    const KernelTable& kernels = table(best_isa());
    const std::uint64_t before = kernels.checksum(w.data(), n, 77);
    const std::uint64_t change =
        kernels.move(w.data(), sum.index().data(), sum.sum().data(), sum.index().size(), 2.0F, 77);
    EXPECT_EQ(w, expected);
    EXPECT_EQ(before + change, kernels.checksum(w.data(), n, 77));
    sum.clear();
    EXPECT_TRUE(sum.index().empty());
  }
}

TEST(SparseSum, GivesItsEntriesAscendingAndOnce) {
  using Entries = std::vector<std::pair<std::size_t, float>>;
  const auto drained = [](SparseSum& sum) {
    Entries entries;
    sum.drain([&](std::size_t j, float value) { entries.emplace_back(j, value); });
    return entries;
  };
  SparseSum sum;
  sum.add(0.5F, std::vector<std::uint16_t>{3, 64, 4095}, std::vector<float>{2.0F, 4.0F, -2.0F});
  sum.add(0.25F, std::vector<std::uint16_t>{0, 64}, std::vector<float>{8.0F, -8.0F});
  EXPECT_EQ(drained(sum), (Entries{{0, 2.0F}, {3, 1.0F}, {64, 0.0F}, {4095, -1.0F}}));
  EXPECT_TRUE(drained(sum).empty());
  sum.add(1.0F, std::vector<std::uint16_t>{64}, std::vector<float>{5.0F});
  EXPECT_EQ(drained(sum), (Entries{{64, 5.0F}}));
}

}  // namespace
}  // namespace distro::kernels
