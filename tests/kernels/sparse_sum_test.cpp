#include "kernels/sparse_sum.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace distro::kernels {
namespace {

TEST(SparseSum, AddsInOrderAndKeepsTheChecksum) {
  std::mt19937 random(5);
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
    for (const float weight : {0.25F, 0.7F, 0.05F}) {
      std::vector<std::uint16_t> index;
      std::vector<float> value;
      for (std::size_t i = random() % 40; i < n; i += 1 + random() % 40) {
        index.push_back(static_cast<std::uint16_t>(i));
        value.push_back(normal(random));
        dense[i] += weight * value.back();
      }
      sum.add(weight, index, value);
    }
    for (std::size_t i = 0; i < n; ++i) {
      expected[i] += 2.0F * dense[i];
    }
    const KernelTable& kernels = table(best_isa());
    const std::uint64_t before = kernels.checksum(w.data(), n, 77);
    const std::uint64_t change = sum.move_into(w.data(), 2.0F, 77);
    EXPECT_EQ(w, expected);
    EXPECT_EQ(before + change, kernels.checksum(w.data(), n, 77));
  }
  std::vector<float> untouched(4096, 1.5F);
  EXPECT_EQ(sum.move_into(untouched.data(), 1.0F, 0), 0U);
}

TEST(SparseSum, GivesItsEntriesAscendingAndOnce) {
  SparseSum sum;
  sum.add(0.5F, std::vector<std::uint16_t>{3, 64, 4095}, std::vector<float>{2.0F, 4.0F, -2.0F});
  sum.add(0.25F, std::vector<std::uint16_t>{0, 64}, std::vector<float>{8.0F, -8.0F});
  std::vector<std::uint16_t> index(4096);
  std::vector<float> value(4096);
  ASSERT_EQ(sum.take(index.data(), value.data()), 4U);
  index.resize(4);
  value.resize(4);
  EXPECT_EQ(index, (std::vector<std::uint16_t>{0, 3, 64, 4095}));
  EXPECT_EQ(value, (std::vector<float>{2.0F, 1.0F, 0.0F, -1.0F}));
  EXPECT_EQ(sum.take(index.data(), value.data()), 0U);
}

}  // namespace
}  // namespace distro::kernels
