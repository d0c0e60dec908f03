#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "isas.h"

namespace distro::kernels {
namespace {

std::vector<std::uint16_t> sorted_select(const std::vector<float>& r, std::size_t k) {
  std::vector<std::uint16_t> index(r.size());
  std::iota(index.begin(), index.end(), std::uint16_t{0});
  std::stable_sort(index.begin(), index.end(), [&](std::uint16_t a, std::uint16_t b) {
    return std::abs(r[a]) > std::abs(r[b]);
  });
  std::erase_if(index, [&](std::uint16_t i) { return r[i] == 0.0F; });
  index.resize(std::min(k, index.size()));
  std::sort(index.begin(), index.end());
  return index;
}

using Maker = std::function<float(std::mt19937&, std::size_t)>;

float normal(std::mt19937& random) { return std::normal_distribution<float>()(random); }

const std::vector<std::pair<std::string, Maker>>& makers() {
  static const std::vector<std::pair<std::string, Maker>> kMakers{
      {"normal", [](auto& random, auto) { return normal(random); }},
      {"heavy tails", [](auto& random, auto) { return std::pow(normal(random), 9.0F); }},
      {"many ties", [](auto& random, auto) { return static_cast<float>(random() % 5) - 2.0F; }},
      {"all equal", [](auto&, auto) { return -0.25F; }},
      {"all zero", [](auto&, auto i) { return i % 2 == 0 ? 0.0F : -0.0F; }},
      {"denormals",
       [](auto& random, auto) {
         return static_cast<float>(random() % 50) * std::numeric_limits<float>::denorm_min();
       }},
      {"one huge", [](auto&, auto i) { return i == 5 ? -3e38F : 1e-30F; }},
      {"few", [](auto& random, auto) { return random() % 400 == 0 ? normal(random) : 0.0F; }},
      {"rising", [](auto&, auto i) { return static_cast<float>(i); }},
      {"falling", [](auto&, auto i) { return -5000.0F + static_cast<float>(i); }},
      {"clustered", [](auto& random, auto i) { return i < 40 ? 9 * normal(random) : 1e-3F; }},
  };
  return kMakers;
}

void compare(const std::vector<float>& r, std::size_t k, const std::string& what) {
  const std::vector<std::uint16_t> expected = sorted_select(r, k);
  for (const Isa isa : isas()) {
    std::vector<std::uint16_t> index(k);
    index.resize(table(isa).select(r.data(), r.size(), k, index.data()));
    ASSERT_EQ(index, expected) << what << " n " << r.size() << " k " << k << " isa "
                               << static_cast<int>(isa);
  }
}

TEST(Select, EqualsSortingForAnyValuesSizesAndCounts) {
  std::mt19937 random(3);
  for (const auto& [name, make] : makers()) {
    for (const std::size_t n : {1U, 2U, 15U, 16U, 17U, 63U, 64U, 65U, 700U, 4032U, 4095U, 4096U}) {
      std::vector<float> r(n);
      for (std::size_t i = 0; i < n; ++i) {
        r[i] = make(random, i);
      }
      for (const std::size_t k :
           {1U, 2U, 6U, 8U, 9U, 12U, 13U, 48U, 64U, 65U, 255U, 256U, 257U, 1000U, 4095U, 4096U}) {
        if (k <= n) {
          compare(r, k, name);
        }
      }
      compare(r, n, name);
    }
  }
}

TEST(Select, EqualsSortingForEveryCountOfASmallTile) {
  std::mt19937 random(4);
  for (const auto& [name, make] : makers()) {
    std::vector<float> r(150);
    for (std::size_t i = 0; i < r.size(); ++i) {
      r[i] = make(random, i);
    }
    for (std::size_t k = 1; k <= r.size(); ++k) {
      compare(r, k, name);
    }
  }
}

TEST(Select, NaNIsOnlyAnEntryLikeOthers) {
  std::vector<float> r(4096, std::bit_cast<float>(0xffffffffU));
  for (const Isa isa : isas()) {
    std::vector<std::uint16_t> index(6);
    EXPECT_EQ(table(isa).select(r.data(), r.size(), 6, index.data()), 6U);
    EXPECT_EQ(index.back(), 5);
  }
}

}  // namespace
}  // namespace distro::kernels
