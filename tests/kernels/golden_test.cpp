#include "tests/golden.h"

#include <functional>
#include <utility>

#include "elements.h"
#include "inverse.h"
#include "isas.h"
#include "kernels/dct_basis.h"

namespace distro::kernels {
namespace {

using test::GoldenLine;
using test::Hash;
using test::Numbers;

constexpr const char* kNames[] = {"f32", "f64", "f16", "bf16"};

// Of kernels that walk along a tile: less than a vector, whole and broken vectors, a whole tile.
constexpr std::size_t kSizes[] = {1, 15, 16, 17, 100, 768, 4095, 4096};

/// Magnitudes of 2^low to 2^high, and now and then a zero of either sign, the smallest or largest
/// subnormal, or `largest`.
std::vector<float> values(std::uint64_t seed, std::size_t n, int low, int high,
                          float largest = 0x1.fffffep99F) {
  const float special[] = {0.0F, -0.0F, 0x1p-149F, -0x1.fffffcp-127F, largest};
  Numbers numbers(seed);
  std::vector<float> all(n);
  for (std::size_t i = 0; i < n; ++i) {
    all[i] = i % 50 == 7 ? special[i / 50 % std::size(special)] : numbers.wide(low, high);
  }
  return all;
}

/// A tile as the weights' kernels see it. No NaN comes of it: which one does is not specified.
struct Weights {
  Weights(DType dtype, std::size_t n) : x(n * size_of(dtype)) {
    const float largest = dtype == DType::f16 ? 0x1p14F : 0x1p99F;
    w = values(1, n, -12, 2, largest);
    r = values(2, n, -20, -4, largest);
    const std::vector<float> moves = values(3, n, -20, -4, largest);
    for (std::size_t i = 0; i < n; ++i) {
      put(dtype, x.data(), i, static_cast<double>(w[i]) + static_cast<double>(moves[i]) / 2);
    }
  }
  std::vector<float> w;
  std::vector<float> r;
  std::vector<std::byte> x;
};

void see_absorb(const KernelTable& kernels, DType dtype, Hash& hash) {
  for (const std::size_t n : kSizes) {
    Weights tile(dtype, n);
    hash.add(kernels.absorb(dtype, tile.x.data(), tile.w.data(), tile.r.data(), n, 0.35F));
    hash.add(tile.r);
  }
}

void see_restore(const KernelTable& kernels, DType dtype, Hash& hash) {
  for (const std::size_t n : kSizes) {
    Weights tile(dtype, n);
    kernels.restore(dtype, tile.x.data(), tile.w.data(), tile.r.data(), n, 0.35F);
    hash.add(tile.x);
  }
}

void see_finite(const KernelTable& kernels, DType dtype, Hash& hash) {
  for (const double value :
       {0.0, -0.0, 0x1p-149, 65504.0, 65520.0, 0x1.fep99, 0x1.fffffffffffffp99, 0x1p100, -0x1p100,
        std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    for (const std::size_t n : kSizes) {
      std::vector<std::byte> x(n * size_of(dtype));
      put(dtype, x.data(), n / 2, value);
      hash.add(kernels.finite(dtype, x.data(), n));
    }
  }
}

void see_adopt(const KernelTable& kernels, DType dtype, Hash& hash) {
  for (const std::size_t n : kSizes) {
    Weights tile(dtype, n);
    hash.add(kernels.adopt(dtype, tile.x.data(), tile.w.data(), n));
    hash.add(tile.w);
  }
}

// Blocks of a matrix of 70 columns: rows and columns.
constexpr std::pair<std::size_t, std::size_t> kBlocks[] = {{64, 64}, {1, 64}, {64, 1}, {7, 33}};
constexpr std::size_t kStride = 70;

void see_gather(const KernelTable& kernels, DType dtype, Hash& hash) {
  const Weights tile(dtype, 64 * kStride);
  for (const auto& [rows, columns] : kBlocks) {
    std::vector<float> block(rows * columns);
    kernels.gather(dtype, tile.x.data(), kStride, block.data(), rows, columns);
    hash.add(block);
  }
}

void see_derive(const KernelTable& kernels, DType dtype, Hash& hash) {
  for (const std::size_t n : kSizes) {
    Weights tile(dtype, n);
    hash.add(kernels.derive(dtype, tile.x.data(), tile.w.data(), tile.r.data(), n));
    hash.add(tile.r);
  }
}

void see_scatter(const KernelTable& kernels, DType dtype, Hash& hash) {
  const std::vector<float> block = values(4, kTileElements, -30, 20);
  for (const auto& [rows, columns] : kBlocks) {
    std::vector<std::byte> x(64 * kStride * size_of(dtype));
    kernels.scatter(dtype, block.data(), x.data(), kStride, rows, columns, Store::cached);
    hash.add(x);
  }
}

void see_select(const KernelTable& kernels, std::size_t k, Hash& hash) {
  for (const std::size_t n : kSizes) {
    std::vector<float> r = values(5, n, -4, 4);
    for (int ties = 0; ties < 2; ++ties) {
      std::vector<std::uint16_t> index(k);
      index.resize(kernels.select(r.data(), n, std::min(k, n), index.data()));
      hash.add(index);
      Numbers numbers(6);
      for (float& value : r) {
        value = static_cast<float>(numbers.below(9)) - 4.0F;
      }
    }
  }
}

void see_checksum(const KernelTable& kernels, Hash& hash) {
  for (const std::size_t n : kSizes) {
    hash.add(kernels.checksum(values(7, n, -20, 4).data(), n, std::uint64_t{n} << 32));
  }
}

void see_move(const KernelTable& kernels, Hash& hash) {
  for (const std::size_t n : kSizes) {
    std::vector<float> w = values(13, n, -20, 4);
    std::vector<std::uint16_t> index;
    Numbers numbers(14);
    for (std::size_t i = numbers.below(3); i < n; i += 1 + numbers.below(n < 4096 ? 3 : 80)) {
      index.push_back(static_cast<std::uint16_t>(n - 1 - i));
    }
    const std::vector<float> sum = values(15, index.size(), -10, -2);
    hash.add(kernels.move(w.data(), index.data(), sum.data(), index.size(), 1.7F,
                          std::uint64_t{n} << 32));
    hash.add(w);
  }
}

void see_decay_and_add(const KernelTable& kernels, Hash& hash) {
  for (const std::size_t n : kSizes) {
    std::vector<float> m = values(8, n, -10, 4);
    kernels.decay_and_add(m.data(), values(9, n, -10, 4).data(), n, 0.9F);
    hash.add(m);
  }
}

void see_signs(const KernelTable& kernels, Hash& hash) {
  for (const std::size_t n : kSizes) {
    std::vector<float> x = values(10, n, -126, 90);
    x[n / 2] = std::numeric_limits<float>::quiet_NaN();
    kernels.signs(x.data(), n);
    hash.add(x);
  }
}

void see_dct(const KernelTable& kernels, std::size_t rows, std::size_t columns, Hash& hash) {
  std::vector<float> block = values(11, rows * columns, -6, 2, 100.0F);
  std::vector<float> coefficients(block.size());
  kernels.dct(block.data(), columns, coefficients.data(), rows, columns);
  hash.add(coefficients);
}

void see_inverse_dct(const KernelTable& kernels, std::size_t rows, std::size_t columns,
                     std::size_t entries, Hash& hash) {
  Numbers numbers(12);
  std::vector<float> coefficients(rows * columns);
  for (std::size_t i = 0; i < entries; ++i) {
    const std::size_t at = entries < coefficients.size() ? numbers.below(coefficients.size()) : i;
    coefficients[at] = numbers.wide(-6, 2);
  }
  hash.add(inverse_dct(kernels, coefficients, rows, columns));
}

using See = std::function<void(const KernelTable&, Hash&)>;

std::vector<std::pair<std::string, See>> computations() {
  std::vector<std::pair<std::string, See>> all;
  using SeeTyped = void (*)(const KernelTable&, DType, Hash&);
  const std::pair<const char*, SeeTyped> typed[] = {
      {"absorb", see_absorb},  {"derive", see_derive}, {"restore", see_restore},
      {"finite", see_finite},  {"adopt", see_adopt},   {"gather", see_gather},
      {"scatter", see_scatter}};
  for (const auto& [name, see] : typed) {
    for (const DType dtype : kDTypes) {
      all.emplace_back(fmt::format("{} {}", name, kNames[static_cast<std::size_t>(dtype)]),
                       [see = see, dtype](const KernelTable& kernels, Hash& hash) {
                         see(kernels, dtype, hash);
                       });
    }
  }
  for (const std::size_t k : {1U, 6U, 10U, 32U, 256U, 4096U}) {
    all.emplace_back(fmt::format("select {}", k),
                     [k](const KernelTable& kernels, Hash& hash) { see_select(kernels, k, hash); });
  }
  all.emplace_back("checksum", see_checksum);
  all.emplace_back("move", see_move);
  all.emplace_back("decay_and_add", see_decay_and_add);
  all.emplace_back("signs", see_signs);
  const std::pair<std::size_t, std::size_t> sides[] = {{64, 64}, {64, 17}, {31, 48}, {1, 8},
                                                       {1, 64},  {64, 1},  {3, 5},   {63, 61}};
  for (const auto& [rows, columns] : sides) {
    all.emplace_back(fmt::format("dct {} x {}", rows, columns),
                     [rows = rows, columns = columns](const KernelTable& kernels, Hash& hash) {
                       see_dct(kernels, rows, columns, hash);
                     });
    for (const std::size_t entries : {rows * columns, std::size_t{6}, std::size_t{1}}) {
      all.emplace_back(
          fmt::format("inverse_dct {} x {} of {}", rows, columns, entries),
          [rows = rows, columns = columns, entries](const KernelTable& kernels, Hash& hash) {
            see_inverse_dct(kernels, rows, columns, entries, hash);
          });
    }
  }
  all.emplace_back("dct of all sides", [](const KernelTable& kernels, Hash& hash) {
    for (std::size_t side = 1; side <= kLargestSide; ++side) {
      see_dct(kernels, side, 1 + side * 37 % kLargestSide, hash);
    }
  });
  all.emplace_back("inverse_dct of all sides", [](const KernelTable& kernels, Hash& hash) {
    for (std::size_t side = 1; side <= kLargestSide; ++side) {
      const std::size_t columns = 1 + side * 37 % kLargestSide;
      see_inverse_dct(kernels, side, columns, 10, hash);
      see_inverse_dct(kernels, side, columns, side * columns, hash);
    }
  });
  return all;
}

// clang-format off
constexpr GoldenLine<1> kGolden[] = {
    {"absorb f32", {0x97e1e28f0cc99b7e}},
    {"absorb f64", {0xdd0282146b72814e}},
    {"absorb f16", {0xef66639e94162c0b}},
    {"absorb bf16", {0xe35a050c3d22178b}},
    {"restore f32", {0xb6c1468a9e9b4370}},
    {"restore f64", {0xde09ea2048770cde}},
    {"restore f16", {0x5dc34122d3a39ea9}},
    {"restore bf16", {0x7329be597c00d3ee}},
    {"finite f32", {0xa6b83b2c0fbdfd63}},
    {"finite f64", {0x03be653fc48db477}},
    {"finite f16", {0xba9b2f555ad64893}},
    {"finite bf16", {0xa6b83b2c0fbdfd63}},
    {"adopt f32", {0xcce28428ab62d8bc}},
    {"adopt f64", {0xcce28428ab62d8bc}},
    {"adopt f16", {0x33bd02b844e8b875}},
    {"adopt bf16", {0x59d2c7bc727c8dae}},
    {"gather f32", {0x7186d17f6c9fad33}},
    {"gather f64", {0x7186d17f6c9fad33}},
    {"gather f16", {0x3727f5a558f6aef2}},
    {"gather bf16", {0x479ccacc94ca37d7}},
    {"scatter f32", {0x57b15835fec5977c}},
    {"scatter f64", {0x145fffba61a709a4}},
    {"scatter f16", {0x82f3ebc9faaba0be}},
    {"scatter bf16", {0x32a96de766691b94}},
    {"select 1", {0x5a282a509af509da}},
    {"select 6", {0xc4b7a834e30ef18a}},
    {"select 10", {0x19bfc536690940c2}},
    {"select 32", {0x0d5348ab7474691c}},
    {"select 256", {0x55441dd64d934137}},
    {"select 4096", {0x53468d97a4b36048}},
    {"checksum", {0x569421300028413a}},
    {"decay_and_add", {0x4cfc3b409781ee16}},
    {"signs", {0x6dedc9e60bec67d0}},
    {"dct 64 x 64", {0x910d2ccc1e911707}},
    {"inverse_dct 64 x 64 of 4096", {0x925892abc140253e}},
    {"inverse_dct 64 x 64 of 6", {0x7678243d13b28d2c}},
    {"inverse_dct 64 x 64 of 1", {0x98d866e49b0753b3}},
    {"dct 64 x 17", {0xcb1cbfc6347c8662}},
    {"inverse_dct 64 x 17 of 1088", {0x47e0410d933afc12}},
    {"inverse_dct 64 x 17 of 6", {0xdf30d946784f725f}},
    {"inverse_dct 64 x 17 of 1", {0x92ff53071b6fd8e5}},
    {"dct 31 x 48", {0xf3e8d3a1701a4f3f}},
    {"inverse_dct 31 x 48 of 1488", {0x45e1ba6f615606c4}},
    {"inverse_dct 31 x 48 of 6", {0x2d2f52ac51c7965e}},
    {"inverse_dct 31 x 48 of 1", {0x24287e69b1a2affe}},
    {"dct 1 x 8", {0x9e02d0de27c68608}},
    {"inverse_dct 1 x 8 of 8", {0x951d7820e00abb1d}},
    {"inverse_dct 1 x 8 of 6", {0x79aaae02c60163e1}},
    {"inverse_dct 1 x 8 of 1", {0xb17eb60ba994d6a6}},
    {"dct 1 x 64", {0x7e139330b3d5939a}},
    {"inverse_dct 1 x 64 of 64", {0x8b3d5c63b264b2e3}},
    {"inverse_dct 1 x 64 of 6", {0x5e2ab0724ff1ec44}},
    {"inverse_dct 1 x 64 of 1", {0x4cf2beaa5bbdc0cc}},
    {"dct 64 x 1", {0x7e139330b3d5939a}},
    {"inverse_dct 64 x 1 of 64", {0x42a06a7dd537a6e1}},
    {"inverse_dct 64 x 1 of 6", {0x94360dcac51fa533}},
    {"inverse_dct 64 x 1 of 1", {0x4cf2beaa5bbdc0cc}},
    {"dct 3 x 5", {0xe3615a1cc422d2cc}},
    {"inverse_dct 3 x 5 of 15", {0x9c595748bd1d98a6}},
    {"inverse_dct 3 x 5 of 6", {0x783355f075c57425}},
    {"inverse_dct 3 x 5 of 1", {0xbb60738068386333}},
    {"dct 63 x 61", {0xb98666a3628d04cd}},
    {"inverse_dct 63 x 61 of 3843", {0xdaf8da62a4a5ca17}},
    {"inverse_dct 63 x 61 of 6", {0x6bbf60ab1f0082eb}},
    {"inverse_dct 63 x 61 of 1", {0xb1e3890a9f9f21ae}},
    {"dct of all sides", {0xb3cff3619b8de10c}},
    {"inverse_dct of all sides", {0x9ea704a1ba16eb16}},
    {"derive f32", {0xc54bb4a776e746e5}},
    {"derive f64", {0xf6e4789865b03c13}},
    {"derive f16", {0x09a14025f721404e}},
    {"derive bf16", {0xa244c2a80f61a733}},
    {"move", {0x2518f2b7e22db6d7}},
};
// clang-format on

TEST(KernelsGolden, EveryMachineAndInstructionSetHasTheseBits) {
  test::Golden<1> golden(kGolden);
  for (const auto& [name, see] : computations()) {
    Hash scalar;
    see(table(Isa::scalar), scalar);
    golden.see(name, {scalar.value()});
    for (const Isa isa : isas()) {
      Hash hash;
      see(table(isa), hash);
      EXPECT_EQ(hash.value(), scalar.value()) << name << " isa " << static_cast<int>(isa);
    }
  }
  golden.finish();
}

/// As the source would have them, for a failing test.
std::string written_out(const std::vector<float>& values) {
  return fmt::format("{{{:#.9g}F}}", fmt::join(values, "F, "));
}

TEST(KernelsGolden, TheDctOfEightPoints) {
  const std::vector<float> block{1, 2, 3, 4, 5, 6, 7, 8};
  // sum / sqrt 8; then 1/2 of the sum of block[i] cos(pi (2i+1) v / 16).
  const std::vector<float> coefficients{12.7279215F, -6.44232273F,  0, -0.67345494F,
                                        0,           -0.200903028F, 0, -0.0507023931F};
  const std::vector<float> back{0.999999642F, 1.99999976F, 2.99999976F, 3.99999952F,
                                4.99999952F,  5.99999905F, 6.99999905F, 8.00000000F};
  for (const Isa isa : isas()) {
    std::vector<float> result(8);
    table(isa).dct(block.data(), 8, result.data(), 1, 8);
    EXPECT_EQ(result, coefficients) << written_out(result);
    // A column has the same transform as a row.
    table(isa).dct(block.data(), 1, result.data(), 8, 1);
    EXPECT_EQ(result, coefficients) << written_out(result);
    const std::vector<float> inverse = inverse_dct(table(isa), coefficients, 1, 8);
    EXPECT_EQ(inverse, back) << written_out(inverse);
  }
}

TEST(KernelsGolden, RoundingToTheSixteenBitTypes) {
  struct Rounded {
    float value;
    std::uint16_t f16;
    std::uint16_t bf16;
  };
  constexpr Rounded kRounded[] = {
      {0.0F, 0x0000, 0x0000},
      {-0.0F, 0x8000, 0x8000},
      {1.0F, 0x3c00, 0x3f80},
      {-2.5F, 0xc100, 0xc020},
      {0x1.002p0F, 0x3c00, 0x3f80},       // f16: a tie, down to even
      {0x1.006p0F, 0x3c02, 0x3f80},       // f16: a tie, up to even
      {0x1.01p0F, 0x3c04, 0x3f80},        // bf16: a tie, down to even
      {0x1.03p0F, 0x3c0c, 0x3f82},        // bf16: a tie, up to even
      {65504.0F, 0x7bff, 0x4780},         // f16's largest
      {65519.0F, 0x7bff, 0x4780},         // f16: the last that is not infinity
      {65520.0F, 0x7c00, 0x4780},         // f16: infinity
      {0x1p-24F, 0x0001, 0x3380},         // f16's smallest subnormal
      {0x1p-25F, 0x0000, 0x3300},         // f16: a tie, down to zero
      {0x1.000002p-25F, 0x0001, 0x3300},  // f16: above it
      {0x1p-149F, 0x0000, 0x0000},        // f32's smallest subnormal
      {0x1p-133F, 0x0000, 0x0001},        // bf16's smallest subnormal
      {-0x1.fffffep99F, 0xfc00, 0xf180},  // the largest weight of f32
  };
  for (const auto& [value, f16, bf16] : kRounded) {
    for (const Isa isa : isas()) {
      std::uint16_t bits = 0;
      table(isa).scatter(DType::f16, &value, &bits, 1, 1, 1, Store::cached);
      EXPECT_EQ(bits, f16) << value;
      table(isa).scatter(DType::bf16, &value, &bits, 1, 1, 1, Store::cached);
      EXPECT_EQ(bits, bf16) << value;
    }
  }
}

}  // namespace
}  // namespace distro::kernels
