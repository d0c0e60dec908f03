#include <fmt/format.h>
#include <gtest/gtest.h>

#include <random>

#include "plugins/gradient.h"

namespace distro::plugins {
namespace {

struct Repeated {
  std::vector<std::int64_t> shape;
  std::size_t times;
};

/// GPT-2 small as Hugging Face cuts it: 124 M weights. The 50257 rows of the embedding are cut into
/// the same blocks as five times 157 strips of 64 rows and 17 rows, which is sooner done.
const std::vector<Repeated> kGpt2Small{{{157 * 64, 768}, 5}, {{17, 768}, 1}, {{1024, 768}, 1},
                                       {{768, 2304}, 12},    {{2304}, 12},   {{768, 768}, 12},
                                       {{768, 3072}, 12},    {{3072}, 12},   {{3072, 768}, 12},
                                       {{768}, 12 * 6 + 2}};

TEST(GradientSize, Gpt2EarnsTheName) {
  // Some random gradients, repeated at shifting places.
  std::mt19937 random(12);
  std::normal_distribution<float> normal;
  std::vector<float> some(1 << 16);
  for (float& value : some) {
    value = normal(random);
  }
  std::size_t elements = 0;
  std::size_t bytes = 0;
  for (const auto& [shape, times] : kGpt2Small) {
    const GradientCodec codec({shape}, {.isa = kernels::best_isa()});
    std::vector<float> gradient(codec.tensor_elements(0));
    for (std::size_t i = 0; i < gradient.size();) {
      const std::size_t from = random() % 4096;
      const std::size_t n = std::min(some.size() - from, gradient.size() - i);
      std::copy_n(some.begin() + static_cast<std::ptrdiff_t>(from), n,
                  gradient.begin() + static_cast<std::ptrdiff_t>(i));
      i += n;
    }
    const TensorView views[] = {{gradient.data(), kernels::DType::f32, gradient.size()}};
    Residual residual;
    Residual* const residuals[] = {&residual};
    elements += times * gradient.size();
    bytes += times * codec.encode(views, residuals).record.size();  // with section lengths
  }
  ASSERT_EQ(elements, 124439808U);
  const double per_tile = static_cast<double>(bytes) * 8 * 4096 / static_cast<double>(elements);
  const double ratio = static_cast<double>(elements) * 2 / static_cast<double>(bytes);
  fmt::print(
      "GPT-2 small's gradients, K=6: {} bytes, {:.2f} bits per 4096, 1/{:.0f} of fp32, 1/{:.0f} of "
      "bf16\n",
      bytes, per_tile, ratio * 2, ratio);
  EXPECT_GE(ratio, 857.0);
}

}  // namespace
}  // namespace distro::plugins
