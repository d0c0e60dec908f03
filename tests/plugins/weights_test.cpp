#include "plugins/weights.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <tbb/global_control.h>
#include <tbb/task_arena.h>

#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/half.h"
#include "plugins/weights_defaults.h"
#include "simulation.h"

namespace distro::plugins {
namespace {

/// Bits of W of all tensors.
std::vector<float> flat(const WeightsCodec& codec, bool residual = false) {
  std::vector<float> all;
  for (std::size_t tensor = 0; tensor < codec.geometry().tensors(); ++tensor) {
    const auto part = residual ? codec.residual(tensor) : codec.reference(tensor);
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

/// The checksum over W from nothing.
std::uint64_t dense_checksum(const WeightsCodec& codec) {
  std::uint64_t sum = 0;
  for (std::size_t tensor = 0; tensor < codec.geometry().tensors(); ++tensor) {
    const std::vector<float> w = codec.reference(tensor);
    for_each_weight(codec.geometry(), [&](std::size_t of, std::size_t i, std::size_t flat) {
      sum += of == tensor ? kernels::mix(flat, w[i]) : 0;
    });
  }
  return sum;
}

double unit(kernels::DType dtype) {
  switch (dtype) {
    case kernels::DType::f32:
      return std::ldexp(1.0, -24);
    case kernels::DType::f64:
      return std::ldexp(1.0, -53);
    case kernels::DType::f16:
      return std::ldexp(1.0, -11);
    case kernels::DType::bf16:
      return std::ldexp(1.0, -8);
  }
  return 0.0;
}

void expect_same_references(const Simulation& simulation) {
  const std::vector<float> w = flat(simulation.codecs[0]);
  for (std::size_t rank = 0; rank < simulation.ranks(); ++rank) {
    const WeightsCodec& codec = simulation.codecs[rank];
    ASSERT_TRUE(same_bits(flat(codec), w)) << "rank " << rank;
    ASSERT_EQ(codec.checksum(), simulation.codecs[0].checksum());
    ASSERT_EQ(codec.checksum(), dense_checksum(codec));
  }
}

// W - P + share * R is x.
void expect_invariants(Simulation& simulation, float share) {
  for (std::size_t rank = 0; rank < simulation.ranks(); ++rank) {
    WeightsCodec& codec = simulation.codecs[rank];
    Module& module = simulation.modules[rank];
    const std::vector<TensorState> states = codec.state(module.views(), share);
    for (std::size_t tensor = 0; tensor < module.tensors().size(); ++tensor) {
      const std::vector<float>& reference = states[tensor].reference;
      const std::vector<float> residual = codec.residual(tensor);
      const std::vector<float>& pending = states[tensor].pending;
      for (std::size_t i = 0; i < module.tensors()[tensor].elements; ++i) {
        const double arrived =
            static_cast<double>(pending.empty() ? reference[i] : reference[i] - pending[i]);
        const double expected =
            arrived + static_cast<double>(share) * static_cast<double>(residual[i]);
        const double rounding = unit(module.tensors()[tensor].dtype) + std::ldexp(1.0, -23);
        if (!(std::abs(module.get(tensor, i) - expected) <=
              std::abs(expected) * rounding + std::ldexp(1.0, -25))) {
          FAIL() << "tensor " << tensor << " element " << i << ": " << module.get(tensor, i)
                 << " is not " << expected;
        }
      }
    }
  }
}

struct Case {
  WeightsConfig config;
  int delay;
  bool mixed;
  std::size_t turns = 1;
};

WeightsConfig spreading(std::uint32_t k) {
  WeightsConfig config{k, 1};
  config.spread_steps = default_spread_steps(k, 1);
  return config;
}

WeightsConfig rounding(std::uint32_t k, std::uint32_t value_bits) {
  WeightsConfig config{k, value_bits};
  config.residual_bits = 16;
  return config;
}

class Weights : public testing::TestWithParam<Case> {};

TEST_P(Weights, ReferencesAgreeAndWeightsFollowForFiftySteps) {
  const auto [config, delay, mixed, turns] = GetParam();
  Plan plan{.ranks = 3, .delay = delay, .gain = 1.7F, .share = 0.6F, .turns = turns};
  plan.isas = {kernels::Isa::scalar, kernels::Isa::avx2, kernels::Isa::avx512};
  Simulation simulation(mixed ? mixed_tensors() : float_tensors(), config, plan);
  for (int step = 0; step < 50; ++step) {
    simulation.step(0.02);
    if (step % 7 == 0 || step == 49) {
      expect_same_references(simulation);
      if (turns == 1) {
        expect_invariants(simulation, plan.share);
      }
    }
    if (turns == 1) {
      EXPECT_NEAR(simulation.last[0].move_mean, 0.02 / 2, mixed ? 0.02 * 0.08 : 0.02 * 0.02);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, Weights,
    testing::Values(Case{{6, 1}, 1, true}, Case{{6, 1}, 0, true}, Case{{6, 32}, 1, true},
                    Case{{48, 1}, 1, false}, Case{{4096, 32}, 1, true}, Case{{4096, 1}, 0, false},
                    Case{{6, 1}, 1, true, 16}, Case{{6, 1}, 0, true, 16},
                    Case{{48, 32}, 1, true, 3}, Case{spreading(128), 1, true},
                    Case{spreading(128), 0, false}, Case{spreading(32), 1, true, 8},
                    Case{rounding(6, 1), 1, true}, Case{rounding(6, 32), 0, true},
                    Case{rounding(48, 1), 1, false}, Case{rounding(10, 1), 1, true, 16}),
    [](const auto& test) {
      return fmt::format("k{}b{}d{}{}t{}s{}r{}", test.param.config.k, test.param.config.value_bits,
                         test.param.delay, test.param.mixed ? "mixed" : "f32", test.param.turns,
                         test.param.config.spread_steps, test.param.config.residual_bits);
    });

TEST(WeightsCodec, NothingThatMovedIsLost) {
  for (const auto& [delay, turns] : {std::pair{0, 1}, {1, 1}, {0, 16}, {1, 16}}) {
    const Plan plan{.ranks = 1,
                    .delay = delay,
                    .gain = 1.0F,
                    .share = 1.0F,
                    .turns = static_cast<std::size_t>(turns)};
    Simulation simulation(float_tensors(), {6, 1}, plan);
    const Module begin = simulation.modules[0];
    for (int step = 0; step < 50; ++step) {
      simulation.step(0.02);
    }
    // One rank with gain and share 1: what was moved is in W or in R, and x is untouched by it.
    const auto state = simulation.codecs[0].state(simulation.modules[0].views(), 1.0F);
    Module alone = begin;
    std::mt19937 random(7);
    Module(float_tensors()).move(random, 1.0);  // as the simulation began
    for (int step = 0; step < 50; ++step) {
      alone.move(random, 0.02);
    }
    for (std::size_t tensor = 0; tensor < alone.tensors().size(); ++tensor) {
      const auto& [reference, residual, pending] = state[tensor];
      EXPECT_TRUE(pending.empty());
      for (std::size_t i = 0; i < alone.tensors()[tensor].elements; ++i) {
        const double sum = static_cast<double>(reference[i]) + static_cast<double>(residual[i]);
        ASSERT_NEAR(sum, alone.get(tensor, i), 2e-5);
        ASSERT_NEAR(simulation.modules[0].get(tensor, i), alone.get(tensor, i), 2e-5);
      }
    }
  }
}

TEST(WeightsCodec, OfARoundedResidualIsLostWhatRoundingTakes) {
  for (const std::size_t turns : {1U, 16U}) {
    WeightsConfig config{6, 1};
    config.residual_bits = 16;
    const float share = 0.5F;
    Simulation simulation(float_tensors(), config,
                          {.ranks = 1, .delay = 0, .gain = 1.0F, .share = share, .turns = turns});
    const Module begin = simulation.modules[0];
    constexpr int kSteps = 64;
    for (int step = 0; step < kSteps; ++step) {
      simulation.step(0.02);
    }
    Module alone = begin;
    std::mt19937 random(7);
    Module(float_tensors()).move(random, 1.0);  // as the simulation began
    for (int step = 0; step < kSteps; ++step) {
      alone.move(random, 0.02);
    }
    Module& module = simulation.modules[0];
    const auto state = simulation.codecs[0].state(module.views(), share);
    double largest = 0.0;
    for (std::size_t tensor = 0; tensor < alone.tensors().size(); ++tensor) {
      const std::vector<float> kept = simulation.codecs[0].residual(tensor);
      for (std::size_t i = 0; i < kept.size(); ++i) {
        ASSERT_EQ(kept[i], kernels::from_bf16(kernels::to_bf16(kept[i])));
        if (turns == 1) {
          ASSERT_EQ(module.get(tensor, i),
                    static_cast<double>(state[tensor].reference[i] + share * kept[i]));
        }
        const double sum = static_cast<double>(state[tensor].reference[i]) +
                           static_cast<double>(state[tensor].residual[i]);
        largest = std::max(largest, std::abs(sum - alone.get(tensor, i)));
      }
    }
    // Of an |R| of .2 at most, a 512th at each of the 64 exchanges.
    EXPECT_LE(largest, 0.2 / 512 * kSteps);
    EXPECT_GT(largest, 1e-4) << "nothing was rounded";
  }
}

TEST(WeightsCodec, SixteenBitWeightsAreWhatARoundedResidualMakesOfThemAtAnyShare) {
  for (const float share : {0.35F, 1.0F}) {
    for (const kernels::DType dtype : {kernels::DType::bf16, kernels::DType::f16}) {
      // Of two turns one is due and the other is looked at: each step leaves all weights.
      for (const auto& [delay, turns] : {std::pair{0, 1U}, {1, 1U}, {1, 2U}}) {
        WeightsConfig config{6, 1};
        config.residual_bits = 16;
        Simulation simulation(
            {{5000, dtype}}, config,
            {.ranks = 2, .delay = delay, .gain = 1.0F, .share = share, .turns = turns});
        simulation.step(0.02);
        for (int step = 0; step < 20; ++step) {
          simulation.step(0.02);
          for (std::size_t rank = 0; rank < simulation.ranks(); ++rank) {
            const std::vector<float> w = simulation.codecs[rank].reference(0);
            const std::vector<float> r = simulation.codecs[rank].residual(0);
            for (std::size_t i = 0; i < w.size(); ++i) {
              const float exact = w[i] + share * r[i];
              const float x = dtype == kernels::DType::bf16
                                  ? kernels::from_bf16(kernels::to_bf16(exact))
                                  : kernels::from_f16(kernels::to_f16(exact));
              ASSERT_EQ(simulation.modules[rank].get(0, i), static_cast<double>(x))
                  << "share " << share << " delay " << delay << " turns " << turns << " step "
                  << step;
            }
          }
        }
      }
    }
  }
}

TEST(WeightsCodec, EverythingSentIsTheMeanOfTheMoves) {
  const Plan plan{.ranks = 4, .delay = 0, .gain = 1.0F, .share = 0.25F};
  Simulation simulation(float_tensors(), {4096, 32}, plan);
  std::mt19937 random(7);
  Module start(float_tensors());
  start.move(random, 1.0);
  for (int step = 0; step < 10; ++step) {
    const std::vector<Module> before = simulation.modules;
    std::vector<Module> after = before;
    for (Module& module : after) {
      module.move(random, 0.02);
    }
    simulation.step(0.02);
    for (std::size_t tensor = 0; tensor < start.tensors().size(); ++tensor) {
      std::vector<std::vector<float>> references;
      for (const WeightsCodec& codec : simulation.codecs) {
        references.push_back(codec.reference(tensor));
        for (const float r : codec.residual(tensor)) {
          ASSERT_EQ(r, 0.0F);
        }
      }
      for (std::size_t i = 0; i < start.tensors()[tensor].elements; ++i) {
        double mean = 0.0;
        for (const Module& module : after) {
          mean += module.get(tensor, i) / 4;
        }
        for (const std::vector<float>& reference : references) {
          ASSERT_NEAR(static_cast<double>(reference[i]), mean, 1e-6);
        }
        ASSERT_EQ(simulation.modules[0].get(tensor, i), static_cast<double>(references[0][i]));
      }
    }
  }
}

TEST(WeightsCodec, ThreadsChangeNoBit) {
  const auto run = [](int threads, std::size_t turns) {
    tbb::task_arena arena(threads);
    Simulation simulation(mixed_tensors(), {6, 1}, {.ranks = 2, .turns = turns});
    std::vector<std::vector<std::byte>> records;
    std::vector<double> moves;
    for (int step = 0; step < 8; ++step) {
      arena.execute([&] { simulation.step(0.02); });
      records.push_back(simulation.last[1].record);
      moves.push_back(simulation.last[1].move_mean);
    }
    return std::tuple(records, moves, simulation.modules[1].bytes(),
                      flat(simulation.codecs[1], true), simulation.codecs[1].checksum());
  };
  const tbb::global_control allow(tbb::global_control::max_allowed_parallelism, 5);
  for (const std::size_t turns : {std::size_t{1}, std::size_t{16}}) {
    const auto one = run(1, turns);
    EXPECT_EQ(run(2, turns), one);
    EXPECT_EQ(run(5, turns), one);
  }
}

TEST(DefaultShare, OwnMovesCountAsSentOnesAndMoreWhereManyAreSent) {
  EXPECT_EQ(default_share(0.125F, 1.0F, 10, 0), 0.125F);
  EXPECT_EQ(default_share(0.5F, 2.0F, 10, 0), 0.5F);
  EXPECT_EQ(default_share(0.5F, 2.0F, 32, 12), 1.0F);
  EXPECT_EQ(default_share(0.125F, 1.0F, 64, 24), 0.125F);
  for (const std::uint32_t spread_steps : {0U, 24U}) {
    EXPECT_EQ(default_share(0.125F, 1.0F, 65, spread_steps), 0.5F);
  }
  EXPECT_EQ(default_share(1.0F, 1.0F, 128, 48), 1.0F);  // a participant that is alone
}

TEST(WeightsCodec, OnlyWeightsWhoseTurnItIsAreTouched) {
  constexpr std::size_t kTurns = 5;
  Module module(mixed_tensors());
  std::mt19937 random(3);
  module.move(random, 1.0);
  WeightsCodec codec(module.geometry(kTurns), {6, 1});
  codec.begin(module.views());
  ParsedRecord own;
  bool in_flight = false;
  for (std::uint64_t number = 1; number <= 12; ++number) {
    module.move(random, 0.02);
    Module before = module;
    const std::vector<Contribution> contributions{{&own, 1.0F}};
    const Due due{contributions, 0, 2.0F};
    const Step step = codec.advance(module.views(), number, in_flight ? &due : nullptr, 0.5F, 0.5F);
    ParsedRecord sent = codec.parse(step.record, number);
    EXPECT_EQ(sent.turn, number % kTurns);
    std::size_t changed = 0;
    for (std::size_t tensor = 0; tensor < module.tensors().size(); ++tensor) {
      for (std::size_t i = 0; i < module.tensors()[tensor].elements; ++i) {
        const std::size_t turn = i / kTurnElements % kTurns;
        const bool looked_at = turn == number % kTurns || (in_flight && turn == own.turn);
        const bool same = module.get(tensor, i) == before.get(tensor, i);
        ASSERT_TRUE(looked_at || same) << "tensor " << tensor << " element " << i;
        changed += same ? 0 : 1;
      }
    }
    EXPECT_GT(changed, 0U);
    own = std::move(sent);
    in_flight = true;
  }
}

TEST(WeightsCodec, RecordsOfTwoTurnsAreNotOneExchange) {
  Module module(float_tensors());
  WeightsCodec codec(module.geometry(4), {6, 1});
  codec.begin(module.views());
  const ParsedRecord first = codec.parse(codec.empty_record(1), 1);
  const ParsedRecord second = codec.parse(codec.empty_record(2), 2);
  const std::vector<Contribution> contributions{{&first, 0.5F}, {&second, 0.5F}};
  EXPECT_THROW(codec.apply({contributions, 0, 1.0F}), std::invalid_argument);
}

}  // namespace
}  // namespace distro::plugins
