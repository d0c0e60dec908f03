#include <gtest/gtest.h>
#include <tbb/global_control.h>
#include <tbb/task_arena.h>

#include <atomic>
#include <chrono>
#include <new>
#include <thread>

#include "allocations.h"
#include "gradient_ranks.h"
#include "kernels/aligned.h"
#include "plugins/parallel.h"
#include "simulation.h"

/// What a step of the codecs allocates. oneTBB's tasks do not go through operator new: their memory
/// is reused, and is not the codecs'.
namespace distro::plugins {
namespace {

using kernels::DType;

/// Allocations of work(), on all threads.
template <class Work>
std::size_t allocated(const Work& work) {
  const std::size_t before = test::allocations();
  work();
  return test::allocations() - before;
}

class Allocation : public testing::Test {
 protected:
  void SetUp() override {
#if defined(DISTRO_THREAD_SANITIZER)
    GTEST_SKIP() << "its parallel_for() starts threads, which allocate";
#else
    // A worker of oneTBB allocates when it starts: have them all here, or ten seconds late.
    std::atomic<int> here{0};
    const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    arena_.execute([&] {
      parallel_for(kThreads, [&](std::size_t) {
        ++here;
        while (here < static_cast<int>(kThreads) && std::chrono::steady_clock::now() < late) {
          std::this_thread::yield();
        }
      });
    });
#endif
  }

  static constexpr std::size_t kThreads = 4;  // even on a small machine
  tbb::global_control allow_{tbb::global_control::max_allowed_parallelism, kThreads};
  tbb::task_arena arena_{kThreads};
};

TEST_F(Allocation, IsCounted) {
  constexpr std::align_val_t kLine{kernels::kCacheLineBytes};
  EXPECT_EQ(allocated([] { ::operator delete(::operator new(100)); }), 1U);
  EXPECT_EQ(allocated([&] { ::operator delete(::operator new(100, kLine), kLine); }), 1U);
  std::vector<float> grows(1);
  EXPECT_EQ(allocated([&] { grows.resize(100); }), 1U);
  const std::size_t before = test::allocated_bytes();
  {
    const std::vector<double> plain(1000);
    const kernels::AlignedVector<float> aligned(1000);
    EXPECT_GE(test::allocated_bytes() - before, 12000U);
  }
  EXPECT_EQ(test::allocated_bytes(), before);
}

class WeightsAllocation : public Allocation, public testing::WithParamInterface<std::size_t> {};

// A body, and of a parsed one the three vectors of a ParsedRecord: what the callers keep.
constexpr std::size_t kRecord = 1;
constexpr std::size_t kParsed = 3;

TEST_P(WeightsAllocation, IsOfWhatIsReturnedOnly) {
  const std::size_t turns = GetParam();
  const std::vector<Module::Tensor> few{{5000, DType::f32}, {17, DType::bf16}};
  std::vector<Module::Tensor> many(140, {4100, DType::f32});  // more runs than a section has
  many.push_back({70000, DType::f16});
  for (const auto& tensors : {few, many}) {
    Module module(tensors);
    std::mt19937 random(1);
    module.move(random, 1.0);
    const std::vector<TensorView> x = module.views();
    WeightsConfig config{6, 1};
    config.arena = &arena_;
    config.spread_steps = 4;
    WeightsCodec codec(module.geometry(turns), config);
    codec.begin(x);
    ParsedRecord own;
    ParsedRecord next;
    const std::size_t warm_up = turns + 2;
    for (std::uint64_t number = 1; number <= warm_up + 2 * turns; ++number) {
      module.move(random, 0.02);
      const Contribution contributions[] = {{&own, 0.5F}, {&own, 0.5F}};
      const Due due{contributions, 0, 1.7F};
      const Due* const in_flight = number > 1 ? &due : nullptr;
      Step step;
      const std::size_t advance =
          allocated([&] { step = codec.advance(x, number, in_flight, 0.5F, 0.5F); });
      const std::size_t parse = allocated([&] { next = codec.parse(step.record, number); });
      ASSERT_FALSE(next.index.empty());
      own = std::move(next);
      if (number > warm_up) {
        EXPECT_EQ(advance, kRecord) << "exchange " << number << " of " << tensors.size();
        EXPECT_EQ(parse, kParsed);
      }
    }
    const Contribution contributions[] = {{&own, 1.0F}};
    const Due due{contributions, 0, 1.7F};
    const std::uint64_t number = own.turn;
    EXPECT_EQ(allocated([&] { (void)codec.follow(x, number, &due, 0.5F, 0.5F); }), 0U);
    EXPECT_EQ(allocated([&] { (void)codec.encode(x, number, 0.5F); }), kRecord);
    EXPECT_EQ(allocated([&] { codec.settle(x, due, 0.5F); }), 0U);
    EXPECT_EQ(allocated([&] { codec.apply(due); }), 0U);
    EXPECT_EQ(allocated([&] { codec.reshare(x, 0.5F, 0.25F); }), 0U);
    EXPECT_EQ(allocated([&] { codec.leave(x, 0.5F); }), 0U);
    EXPECT_EQ(allocated([&] { (void)codec.first_non_finite(x); }), 0U);
    EXPECT_EQ(allocated([&] { codec.rehash(); }), 0U);
    EXPECT_EQ(allocated([&] { (void)codec.fingerprint(x, 1); }), 1U);  // the views of a part
  }
}

struct Memory {
  float share = 0.0F;
  std::uint32_t spread_steps = 0;
  float gain = 1.0F;
  std::size_t bytes_a_weight = 0;
  std::uint32_t residual_bits = 32;
};

class WeightsMemory : public Allocation, public testing::WithParamInterface<Memory> {};

TEST_P(WeightsMemory, IsOfWRAndPAndAFiftiethBeside) {
  const auto [share, spread_steps, gain, bytes_a_weight, residual_bits] = GetParam();
  constexpr std::size_t kWeights = std::size_t{1} << 21;
  constexpr std::size_t kTurns = 4;
  Module module({{kWeights, DType::f32}});
  const std::vector<TensorView> x = module.views();
  WeightsConfig config{10, 1};
  config.arena = &arena_;
  config.spread_steps = spread_steps;
  config.residual_bits = residual_bits;
  const std::size_t before = test::allocated_bytes();
  WeightsCodec codec(module.geometry(kTurns), config);
  codec.begin(x);
  ParsedRecord own;
  std::mt19937 random(1);
  for (std::uint64_t number = 1; number <= kTurns + 1; ++number) {
    module.set(0, random() % kWeights, 1.0);
    const Contribution contributions[] = {{&own, 1.0F}};
    const Due due{contributions, 0, gain};
    const Step step = codec.advance(x, number, number > 1 ? &due : nullptr, share, share);
    own = codec.parse(step.record, number);
  }
  const auto expect_memory = [before, expected = bytes_a_weight * kWeights] {
    const std::size_t bytes = test::allocated_bytes() - before;
    EXPECT_GE(bytes, expected);
    EXPECT_LE(static_cast<double>(bytes), 1.02 * static_cast<double>(expected));
  };
  expect_memory();
  // Through another share and back.
  codec.reshare(x, share, 0.25F);
  codec.reshare(x, 0.25F, share);
  expect_memory();
  // Resumed.
  {
    auto saved = codec.state(x, share);
    codec.restore_state(0, saved[0].reference, saved[0].residual, saved[0].pending);
    codec.leave(x, share);
  }
  expect_memory();
}

INSTANTIATE_TEST_SUITE_P(Shares, WeightsMemory,
                         testing::Values(Memory{0.5F, 0, 1.7F, 8}, Memory{1.0F, 0, 1.7F, 4},
                                         Memory{1.0F, 12, 1.7F, 8}, Memory{1.0F, 12, 1.0F, 4},
                                         Memory{0.5F, 12, 1.0F, 8}, Memory{0.5F, 12, 1.7F, 12},
                                         Memory{0.5F, 0, 1.7F, 6, 16},
                                         Memory{1.0F, 12, 1.7F, 8, 16}));

INSTANTIATE_TEST_SUITE_P(Turns, WeightsAllocation, testing::Values(1, 16));

TEST_F(Allocation, OfGradientsIsOfWhatIsReturnedOnly) {
  constexpr std::size_t kBefore = 1;
  const std::vector<GradientTensor> few{{{5000}, DType::f32}, {{17}, DType::bf16}};
  const std::vector<GradientTensor> many(140, {{41, 100}, DType::f32});
  for (const auto& tensors : {few, many}) {
    for (const GradientMethod method : {GradientMethod::ef, GradientMethod::demo}) {
      GradientRank rank(tensors, {method, 6, 1});
      const std::vector<TensorView> gradients = rank.gradients.views();
      const std::vector<Residual*> residuals = rank.residual_pointers();
      std::mt19937 random(1);
      for (int step = 0; step < 4; ++step) {
        rank.draw(random);
        EncodedGradients encoded;
        ParsedRecord parsed;
        const auto in_arena = [&](const auto& work) {
          return arena_.execute([&] { return allocated(work); });
        };
        const std::size_t encode =
            in_arena([&] { encoded = rank.codec.encode(gradients, residuals); });
        const std::size_t parse = in_arena([&] { parsed = rank.codec.parse(encoded.record); });
        ASSERT_FALSE(parsed.index.empty());
        const Contribution contributions[] = {{&encoded.own, 0.5F}, {&parsed, 0.5F}};
        EXPECT_EQ(in_arena([&] { rank.codec.decode(contributions, {}, gradients); }), 0U);
        EXPECT_EQ(in_arena([&] { rank.codec.take_back(encoded.own, {}, residuals); }), 0U);
        EXPECT_EQ(parse, kParsed);
        if (step > 0) {  // at first the residuals are made
          EXPECT_EQ(encode, kRecord + kParsed + kBefore);
        }
      }
    }
  }
}

}  // namespace
}  // namespace distro::plugins
