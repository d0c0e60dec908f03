#include "kernels/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "elements.h"
#include "isas.h"
#include "kernels/aligned.h"

namespace distro::kernels {
namespace {

/// Weights of one tile, with subnormals and large values among them.
struct Weights {
  Weights(DType type, std::size_t n, std::uint32_t seed)
      : dtype(type), x(n * size_of(type)), w(n), r(n) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (std::size_t i = 0; i < n; ++i) {
      const double scale = std::exp(3 * normal(random));
      w[i] = static_cast<float>(normal(random) * scale);
      r[i] = static_cast<float>(normal(random) * scale * 1e-2);
      put(dtype, x.data(), i, static_cast<double>(w[i]) + normal(random) * scale * 1e-2);
      if (i % 97 == 5) {
        w[i] = 1e-39F;
        r[i] = -3e-42F;
        put(dtype, x.data(), i, 2e-39);
      }
    }
  }
  DType dtype;
  std::vector<std::byte> x;
  std::vector<float> w;
  std::vector<float> r;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

constexpr std::size_t kSizes[] = {1, 7, 15, 16, 17, 31, 768, 4095, 4096};

TEST(Kernels, TablesExistAndTheBestIsAvailable) {
  EXPECT_EQ(table(Isa::scalar).isa, Isa::scalar);
  EXPECT_EQ(table(best_isa()).isa, best_isa());
}

TEST(Kernels, AllInstructionSetsGiveTheSameBits) {
  for (const DType dtype : kDTypes) {
    for (const std::size_t n : kSizes) {
      Weights base(dtype, n, 11);
      const KernelTable& scalar = table(Isa::scalar);
      const double move =
          scalar.absorb(dtype, base.x.data(), base.w.data(), base.r.data(), n, 0.35F);
      scalar.restore(dtype, base.x.data(), base.w.data(), base.r.data(), n, 0.35F);
      std::vector<float> adopted(n);
      EXPECT_TRUE(scalar.adopt(dtype, base.x.data(), adopted.data(), n));
      for (const Isa isa : isas()) {
        Weights other(dtype, n, 11);
        const KernelTable& kernels = table(isa);
        const double seen =
            kernels.absorb(dtype, other.x.data(), other.w.data(), other.r.data(), n, 0.35F);
        EXPECT_EQ(std::bit_cast<std::uint64_t>(seen), std::bit_cast<std::uint64_t>(move));
        EXPECT_TRUE(same_bits(other.r, base.r));
        kernels.restore(dtype, other.x.data(), other.w.data(), other.r.data(), n, 0.35F);
        EXPECT_EQ(other.x, base.x);
        std::vector<float> w(n);
        EXPECT_TRUE(kernels.adopt(dtype, other.x.data(), w.data(), n));
        EXPECT_TRUE(same_bits(w, adopted));
        EXPECT_EQ(kernels.checksum(w.data(), n, 123), scalar.checksum(w.data(), n, 123));
      }
    }
  }
}

TEST(Kernels, DerivingIsAbsorbingIntoNothing) {
  for (const DType dtype : kDTypes) {
    for (const Isa isa : isas()) {
      for (const std::size_t n : kSizes) {
        const Weights weights(dtype, n, 13);
        const KernelTable& kernels = table(isa);
        std::vector<float> expected(n);
        const double absorbed =
            kernels.absorb(dtype, weights.x.data(), weights.w.data(), expected.data(), n, 0.35F);
        std::vector<float> r(n, std::numeric_limits<float>::quiet_NaN());
        const double derived =
            kernels.derive(dtype, weights.x.data(), weights.w.data(), r.data(), n);
        EXPECT_TRUE(same_bits(r, expected));
        EXPECT_EQ(derived, absorbed);
      }
    }
  }
}

TEST(Kernels, ScatterBringsBackWhatWasGatheredHoweverItIsStored) {
  constexpr std::size_t kStride = 96;
  struct Case {
    std::size_t offset, rows, columns;
  };
  // From a cache line on and not; rows of whole lines and of others.
  const Case cases[] = {{0, 64, 64}, {3, 64, 64}, {0, 5, 32}, {16, 7, 17}, {0, 1, 1}};
  for (const DType dtype : kDTypes) {
    for (const auto& [offset, rows, columns] : cases) {
      const Weights from(dtype, 66 * kStride, 12);
      const std::size_t first = offset * size_of(dtype);
      std::vector<float> block(rows * columns);
      for (const Isa isa : isas()) {
        const KernelTable& kernels = table(isa);
        kernels.gather(dtype, from.x.data() + first, kStride, block.data(), rows, columns);
        for (std::size_t i = 0; i < block.size(); ++i) {
          const std::size_t at = offset + i / columns * kStride + i % columns;
          ASSERT_EQ(block[i], static_cast<float>(get(dtype, from.x.data(), at)));
        }
        for (const Store how : {Store::cached, Store::streamed}) {
          AlignedVector<std::byte> to(from.x.begin(), from.x.end());
          AlignedVector<std::byte> expected = to;
          for (std::size_t i = 0; i < block.size(); ++i) {
            const std::size_t at = offset + i / columns * kStride + i % columns;
            put(dtype, expected.data(), at, static_cast<double>(-block[i]));
          }
          std::vector<float> negative(block.size());
          std::ranges::transform(block, negative.begin(), std::negate());
          kernels.scatter(dtype, negative.data(), to.data() + first, kStride, rows, columns, how);
          ASSERT_EQ(to, expected);
        }
      }
    }
  }
}

TEST(Kernels, AbsorbAndRestoreAreWhatTheyPromise) {
  for (const DType dtype : kDTypes) {
    for (const Isa isa : isas()) {
      const KernelTable& kernels = table(isa);
      constexpr std::size_t kN = 1000;
      Weights now(dtype, kN, 12);
      const Weights was = now;
      const double move = kernels.absorb(dtype, now.x.data(), now.w.data(), now.r.data(), kN, 0.5F);
      double sum = 0.0;
      for (std::size_t i = 0; i < kN; ++i) {
        std::vector<std::byte> left(8);
        const float product = 0.5F * was.r[i];
        const double exact = static_cast<double>(was.w[i]) + 0.5 * static_cast<double>(was.r[i]);
        put(dtype, left.data(), 0,
            dtype == DType::f64 ? exact : static_cast<double>(was.w[i] + product));
        const auto moved =
            static_cast<float>(get(dtype, was.x.data(), i) - get(dtype, left.data(), 0));
        ASSERT_EQ(now.r[i], was.r[i] + moved) << i;
        sum += std::abs(static_cast<double>(moved));
      }
      EXPECT_NEAR(move, sum, 1e-5 * sum);

      // What restore() left is no move.
      kernels.restore(dtype, now.x.data(), now.w.data(), now.r.data(), kN, 0.5F);
      const std::vector<float> r = now.r;
      const double none = kernels.absorb(dtype, now.x.data(), now.w.data(), now.r.data(), kN, 0.5F);
      EXPECT_EQ(none, dtype == DType::f64 ? none : 0.0);
      EXPECT_TRUE(same_bits(r, now.r) || dtype == DType::f64);
    }
  }
}

TEST(Kernels, NonFiniteWeightsAreSeenWhereverTheyAre) {
  for (const DType dtype : kDTypes) {
    for (const Isa isa : isas()) {
      const KernelTable& kernels = table(isa);
      for (const std::size_t n : kSizes) {
        for (const std::size_t at : {std::size_t{0}, n / 2, n - 1}) {
          for (const double bad :
               {std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(),
                std::numeric_limits<double>::quiet_NaN(), 1e31}) {
            Weights weights(dtype, n, 13);
            ASSERT_TRUE(kernels.finite(dtype, weights.x.data(), n));
            put(dtype, weights.x.data(), at, bad);
            ASSERT_FALSE(kernels.finite(dtype, weights.x.data(), n));
            ASSERT_FALSE(kernels.adopt(dtype, weights.x.data(), weights.r.data(), n));
          }
        }
      }
    }
  }
}

TEST(Kernels, ChecksumIsASumOfMixes) {
  const Weights weights(DType::f32, 4096, 15);
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < 4096; ++i) {
    sum += mix(1000 + i, weights.w[i]);
  }
  EXPECT_EQ(table(best_isa()).checksum(weights.w.data(), 4096, 1000), sum);
  EXPECT_NE(mix(0, 0.0F), mix(0, -0.0F));
  EXPECT_NE(mix(0, 1.0F) + mix(1, 2.0F), mix(0, 2.0F) + mix(1, 1.0F));
}

}  // namespace
}  // namespace distro::kernels
