#include <gtest/gtest.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "plugins/weights.h"
#include "simulation.h"

namespace distro::plugins {
namespace {

struct Snapshot {
  Snapshot() = default;
  explicit Snapshot(const Simulation& simulation) : bytes(simulation.modules[0].bytes()) {
    const WeightsCodec& codec = simulation.codecs[0];
    checksum = codec.checksum();
    for (std::size_t tensor = 0; tensor < codec.geometry().tensors(); ++tensor) {
      w.push_back(codec.reference(tensor));
      r.push_back(codec.residual(tensor));
    }
  }
  bool operator==(const Snapshot&) const = default;
  std::vector<std::vector<std::byte>> bytes;
  std::vector<std::vector<float>> w, r;
  std::uint64_t checksum = 0;
};

struct NonFiniteCase {
  std::vector<Module::Tensor> tensors;
  std::size_t turns = 1;
  float share = 0.5F;
};

// What exchange 2 makes of a module; `bad`, if any, stands at an element whose turn it is.
// `before`: as the optimizer left it.
Snapshot exchanged(const NonFiniteCase& setting, std::size_t tensor, std::size_t element,
                   std::optional<double> bad, Snapshot* before) {
  const Plan plan{.ranks = 1, .share = setting.share, .turns = setting.turns};
  Simulation simulation(setting.tensors, {}, plan);
  simulation.step(0.1);
  Module& module = simulation.modules[0];
  WeightsCodec& codec = simulation.codecs[0];
  const ParsedRecord own = codec.parse(simulation.last[0].record, 1);
  const std::vector<Contribution> contributions{{&own, 1.0F}};
  const Due due{contributions, 0, 1.0F};
  std::mt19937 random(1);
  module.move(random, 0.1);
  if (bad) {
    module.set(tensor, element, *bad);
    *before = Snapshot(simulation);
  }
  const Step step = codec.advance(module.views(), 2, &due, setting.share, setting.share);
  EXPECT_EQ(step.non_finite, bad ? std::optional(tensor) : std::nullopt);
  EXPECT_EQ(step.record.empty(), bad.has_value());
  Snapshot after(simulation);
  EXPECT_EQ(codec.begin(module.views()), step.non_finite);
  return after;
}

TEST(WeightsCodecState, ANonFiniteWeightIsNamedAndEveryTileIsAsItWasOrExchanged) {
  const NonFiniteCase cases[] = {
      {mixed_tensors(), 1, 0.5F}, {mixed_tensors(), 3, 1.0F}, {float_tensors(), 3, 1.0F}};
  for (const NonFiniteCase& setting : cases) {
    const Geometry geometry = Module(setting.tensors).geometry(setting.turns);
    for (std::size_t tensor = 0; tensor < setting.tensors.size(); ++tensor) {
      // The last element that exchange 2 looks at: of its turn, or of that of the one that is due.
      std::size_t end = setting.tensors[tensor].elements;
      const auto looked_at = [&](std::size_t element) {
        const std::size_t turn = element / kTurnElements % setting.turns;
        return turn == 1 % setting.turns || turn == 2 % setting.turns;
      };
      while (end > 0 && !looked_at(end - 1)) {
        --end;
      }
      for (const double bad :
           {std::numeric_limits<double>::quiet_NaN(), -std::numeric_limits<double>::infinity()}) {
        if (end == 0) {
          continue;
        }
        Snapshot before;
        const Snapshot expected = exchanged(setting, tensor, end - 1, std::nullopt, nullptr);
        const Snapshot after = exchanged(setting, tensor, end - 1, bad, &before);
        std::size_t as_before = 0;
        for (const Tile& tile : geometry.tiles()) {
          bool as_it_was = true;
          bool as_exchanged = true;
          for (const Segment& segment : geometry.segments(tile)) {
            const std::size_t of = segment.tensor;
            geometry.for_each_stretch(segment, [&](std::size_t at, std::size_t, std::size_t n) {
              const auto like = [&](const Snapshot& other) {
                const std::size_t width = kernels::size_of(setting.tensors[of].dtype);
                const auto same = [&](const auto& a, const auto& b, std::size_t bytes) {
                  return std::memcmp(&a[of][at * bytes], &b[of][at * bytes],
                                     n * bytes * sizeof(a[of][0])) == 0;
                };
                return same(after.bytes, other.bytes, width) && same(after.w, other.w, 1) &&
                       same(after.r, other.r, 1);
              };
              as_it_was = as_it_was && like(before);
              as_exchanged = as_exchanged && like(expected);
            });
          }
          EXPECT_TRUE(as_it_was || as_exchanged);
          as_before += as_it_was ? 1U : 0U;
        }
        EXPECT_GT(as_before, 0U);
      }
    }
  }
}

TEST(WeightsCodecState, AWeightThatTheScriptBringsBackFromInfinityIsLikeAnyOther) {
  Module module({{16, kernels::DType::f16}});
  WeightsCodec codec(module.geometry(), {});
  const std::vector<float> large(16, 65504.0F);
  codec.restore_state(0, large, large, {});
  codec.leave(module.views(), 0.5F);  // 1.5 * 65504, which f16 has not
  EXPECT_EQ(module.get(0, 0), std::numeric_limits<double>::infinity());
  for (std::size_t i = 0; i < 16; ++i) {
    module.set(0, i, 1.0);  // clamped, say
  }
  EXPECT_EQ(codec.encode(module.views(), 1, 0.5F).non_finite, std::nullopt);
  for (const float residual : codec.residual(0)) {
    ASSERT_TRUE(std::isfinite(residual));
  }
}

TEST(WeightsCodecState, TheFirstOfSeveralNonFiniteTensorsIsNamed) {
  Simulation simulation(mixed_tensors(), {}, {.ranks = 1});
  for (const std::size_t tensor : {10U, 4U, 1U, 7U}) {  // of the pool and big ones
    simulation.modules[0].set(tensor, 0, std::numeric_limits<double>::infinity());
  }
  EXPECT_EQ(simulation.codecs[0].encode(simulation.modules[0].views(), 0, 0.5F).non_finite, 1U);
}

TEST(WeightsCodecState, ApplyReadsAndWritesNoWeights) {
  const auto prepared = [] {
    Simulation simulation(mixed_tensors(), {}, {.ranks = 2});
    simulation.step(0.1);
    return simulation;
  };
  Simulation settled = prepared();
  Simulation applied = prepared();
  std::vector<ParsedRecord> records;
  for (std::size_t rank = 0; rank < 2; ++rank) {
    records.push_back(settled.codecs[rank].parse(settled.last[rank].record, 0));
  }
  const std::vector<Contribution> contributions = equal_weights(records);
  settled.codecs[0].settle(settled.modules[0].views(), {contributions, 0, 2.0F}, 0.5F);
  const Snapshot before(applied);
  applied.codecs[0].apply({contributions, 0, 2.0F});
  Snapshot after(applied);
  EXPECT_EQ(after.bytes, before.bytes);
  EXPECT_NE(after.checksum, before.checksum);
  after.bytes = settled.modules[0].bytes();
  EXPECT_EQ(after, Snapshot(settled));
}

TEST(WeightsCodecState, AnEmptyRecordMovesNothing) {
  Simulation simulation(mixed_tensors(), {}, {.ranks = 1});
  simulation.step(0.1);
  WeightsCodec& codec = simulation.codecs[0];
  const Snapshot before(simulation);
  const ParsedRecord nothing = codec.parse(codec.empty_record(0), 0);
  EXPECT_TRUE(nothing.index.empty());
  const std::vector<Contribution> contributions{{&nothing, 1.0F}};
  codec.apply({contributions, 0, 2.0F});
  EXPECT_EQ(Snapshot(simulation), before);
}

class Saved : public testing::TestWithParam<std::uint32_t> {};

TEST_P(Saved, ContinuesWithTheSameBits) {
  WeightsConfig config;
  config.spread_steps = GetParam();
  Simulation simulation(mixed_tensors(), config, {.ranks = 1});
  for (int step = 0; step < 5; ++step) {
    simulation.step(0.1);
  }
  simulation.drain();
  WeightsCodec& codec = simulation.codecs[0];
  Module module = simulation.modules[0];
  WeightsCodec resumed(module.geometry(), config);
  const auto saved = codec.state(module.views(), 0.5F);
  for (std::size_t tensor = 0; tensor < module.tensors().size(); ++tensor) {
    EXPECT_EQ(saved[tensor].pending.size(),
              config.spread_steps > 0 ? module.tensors()[tensor].elements : 0);
    resumed.restore_state(tensor, codec.reference(tensor), codec.residual(tensor),
                          saved[tensor].pending);
  }
  resumed.rehash();
  EXPECT_EQ(resumed.checksum(), codec.checksum());
  std::mt19937 random(2);
  module.move(random, 0.1);
  Module other = module;
  EXPECT_EQ(resumed.advance(module.views(), 0, nullptr, 0.5F, 0.5F).record,
            codec.advance(other.views(), 0, nullptr, 0.5F, 0.5F).record);
  EXPECT_EQ(module.bytes(), other.bytes());
}

INSTANTIATE_TEST_SUITE_P(WithAndWithoutASpread, Saved, testing::Values(0U, 20U));

TEST(WeightsCodecState, AGainThatIsSpreadComesInFullAndAMeanAtOnce) {
  constexpr float kGain = 3.0F;
  constexpr float kMove = 0.5F;
  WeightsConfig config{4096, 32};
  config.spread_steps = 10;
  Simulation simulation(float_tensors(), config, {.ranks = 1});
  WeightsCodec& codec = simulation.codecs[0];
  Module& module = simulation.modules[0];
  const std::size_t tensor = 3;
  const float before = codec.reference(tensor)[0];
  module.set(tensor, 0, before + kMove);
  const ParsedRecord sent = codec.parse(codec.encode(module.views(), 0, 1.0F).record, 0);
  const ParsedRecord nothing = codec.parse(codec.empty_record(0), 0);
  const auto settle = [&](const ParsedRecord& record) {
    const std::vector<Contribution> contributions{{&record, 1.0F}};
    codec.settle(module.views(), {contributions, 0, kGain}, 1.0F);
    return (module.get(tensor, 0) - static_cast<double>(before)) / kMove;
  };
  double last = settle(sent);
  EXPECT_GT(last, 1.0);
  EXPECT_LT(last, 1.0 + (kGain - 1.0) / 10);
  for (int step = 0; step < 100; ++step) {
    const double now = settle(nothing);
    EXPECT_GT(now, last);
    last = now;
  }
  EXPECT_NEAR(last, kGain, 0.001);
}

TEST(WeightsCodecState, AnotherShareLosesNothing) {
  const Plan plan{.ranks = 1, .gain = 1.0F, .share = 0.5F, .turns = 4};
  Simulation simulation(float_tensors(), {}, plan);
  for (int step = 0; step < 6; ++step) {
    simulation.step(0.1);
  }
  WeightsCodec& codec = simulation.codecs[0];
  Module& module = simulation.modules[0];
  const auto before = codec.state(module.views(), 0.5F);
  codec.reshare(module.views(), 0.5F, 0.25F);
  const auto after = codec.state(module.views(), 0.25F);
  for (std::size_t tensor = 0; tensor < before.size(); ++tensor) {
    EXPECT_EQ(after[tensor].reference, before[tensor].reference);
    for (std::size_t i = 0; i < before[tensor].residual.size(); ++i) {
      ASSERT_NEAR(after[tensor].residual[i], before[tensor].residual[i], 1e-5);
      ASSERT_NEAR(module.get(tensor, i),
                  before[tensor].reference[i] + 0.25F * before[tensor].residual[i], 1e-5);
    }
  }
}

TEST(WeightsCodecState, WithAShareOf1ResidualsAreWhatTheWeightsAreAhead) {
  for (const std::uint32_t spread_steps : {0U, 20U}) {
    for (const int delay : {0, 1}) {
      WeightsConfig config;
      config.spread_steps = spread_steps;
      const Plan plan{.ranks = 2, .delay = delay, .share = 1.0F, .turns = 4};
      Simulation simulation(float_tensors(), config, plan);
      for (int step = 0; step < 9; ++step) {
        simulation.step(0.1);
      }
      WeightsCodec& codec = simulation.codecs[0];
      Module& module = simulation.modules[0];
      const auto kept = codec.state(module.views(), 1.0F);
      std::size_t moved = 0;
      for (std::size_t tensor = 0; tensor < kept.size(); ++tensor) {
        EXPECT_EQ(codec.residual(tensor), std::vector<float>(kept[tensor].residual.size()));
        for (std::size_t i = 0; i < kept[tensor].residual.size(); ++i) {
          const float pending = spread_steps > 0 ? kept[tensor].pending[i] : 0.0F;
          const float ahead =
              static_cast<float>(module.get(tensor, i)) - (kept[tensor].reference[i] - pending);
          ASSERT_EQ(kept[tensor].residual[i], ahead);
          moved += ahead != 0.0F ? 1U : 0U;
        }
      }
      EXPECT_GT(moved, codec.geometry().elements() / 2);
      // Another share takes them from there, and the same one brings the weights back.
      const Module before = module;
      codec.reshare(module.views(), 1.0F, 0.25F);
      for (std::size_t tensor = 0; tensor < kept.size(); ++tensor) {
        EXPECT_EQ(codec.residual(tensor), kept[tensor].residual);
      }
      codec.reshare(module.views(), 0.25F, 1.0F);
      for (std::size_t tensor = 0; tensor < kept.size(); ++tensor) {
        for (std::size_t i = 0; i < kept[tensor].residual.size(); ++i) {
          ASSERT_NEAR(module.get(tensor, i), before.get(tensor, i), 1e-6);
        }
      }
      // W alone is shown, and the script puts its own weights back.
      const Module own = module;
      const auto shown = codec.state(module.views(), 1.0F);
      codec.leave(module.views(), 0.0F);
      EXPECT_NE(module.bytes(), own.bytes());
      module = own;
      const auto again = codec.state(module.views(), 1.0F);
      for (std::size_t tensor = 0; tensor < kept.size(); ++tensor) {
        EXPECT_EQ(again[tensor].reference, shown[tensor].reference);
        EXPECT_EQ(again[tensor].residual, shown[tensor].residual);
      }
    }
  }
}

TEST(WeightsCodecState, AFollowerHasTheWeightsOfItsLeaderWhateverTheShares) {
  for (const std::size_t turns : {1U, 3U}) {
    for (const std::uint32_t spread_steps : {0U, 9U}) {
      WeightsConfig config{700, 1};
      config.spread_steps = spread_steps;
      Module leader(float_tensors());
      std::mt19937 random(4);
      leader.move(random, 1.0);
      Module follower = leader;
      WeightsCodec leads(leader.geometry(turns), config);
      WeightsCodec follows(leader.geometry(turns), config);
      leads.begin(leader.views());
      follows.begin(follower.views());
      float before = 0.0F;
      std::uint64_t number = 0;
      for (const float share : {0.5F, 0.5F, 1.0F, 1.0F, 1.0F, 0.25F, 1.0F, 1.0F}) {
        leader.move(random, 0.1);
        follower = leader;
        if (turns > 1 && before != 0.0F && before != share) {  // as the engine does
          leads.reshare(leader.views(), before, share);
          follows.reshare(follower.views(), before, share);
          before = share;
        }
        ++number;
        const ParsedRecord own =
            leads.parse(leads.encode(leader.views(), number, before).record, number);
        const Contribution contributions[] = {{&own, 1.0F}};
        const Due due{contributions, 0, 1.7F};
        leads.settle(leader.views(), due, share);
        ASSERT_FALSE(follows.follow(follower.views(), number, &due, before, share).non_finite);
        ASSERT_EQ(leader.bytes(), follower.bytes()) << "exchange " << number;
        before = share;
      }
    }
  }
}

TEST(WeightsCodecState, ANonFiniteStateIsNoneToGoOnFrom) {
  for (const float share : {0.5F, 1.0F}) {
    Simulation simulation(float_tensors(), {}, {.ranks = 1, .share = share});
    simulation.step(0.1);
    Module& module = simulation.modules[0];
    module.set(0, 5, std::numeric_limits<double>::quiet_NaN());
    const auto saved = simulation.codecs[0].state(module.views(), share);
    EXPECT_THROW(simulation.codecs[0].restore_state(0, saved[0].reference, saved[0].residual, {}),
                 std::invalid_argument);
  }
}

TEST(WeightsCodecState, TheStateHoldsWhatTheOptimizerHasMovedSinceAndLeavesAllAsItWas) {
  Simulation simulation(mixed_tensors(), {}, {.ranks = 1});
  for (int step = 0; step < 5; ++step) {
    simulation.step(0.1);
  }
  WeightsCodec& codec = simulation.codecs[0];
  Module& module = simulation.modules[0];
  const float share = 0.5F;
  codec.leave(module.views(), share);
  std::mt19937 random(3);
  module.move(random, 0.1);
  const Snapshot before(simulation);
  const auto saved = codec.state(module.views(), share);
  EXPECT_EQ(Snapshot(simulation), before);
  WeightsCodec resumed(module.geometry(), {});
  for (std::size_t tensor = 0; tensor < saved.size(); ++tensor) {
    EXPECT_EQ(saved[tensor].reference, before.w[tensor]);
    resumed.restore_state(tensor, saved[tensor].reference, saved[tensor].residual,
                          saved[tensor].pending);
  }
  resumed.rehash();
  Module other = module;
  resumed.leave(other.views(), share);
  // The optimizer's move is in R now, so that both select the same.
  EXPECT_EQ(resumed.encode(other.views(), 0, share).record,
            codec.encode(module.views(), 0, share).record);
}

TEST(WeightsCodecState, MisuseIsNamed) {
  Simulation simulation(float_tensors(), {}, {.ranks = 1});
  WeightsCodec& codec = simulation.codecs[0];
  std::vector<TensorView> views = simulation.modules[0].views();
  const std::vector<float> few(3);
  EXPECT_THROW(codec.restore_state(0, few, few, {}), std::invalid_argument);
  EXPECT_THROW(codec.restore_state(99, few, few, {}), std::invalid_argument);
  const std::vector<float> bad(768, std::numeric_limits<float>::quiet_NaN());
  EXPECT_THROW(codec.restore_state(1, bad, bad, {}), std::invalid_argument);
  EXPECT_THROW(codec.apply({}), std::invalid_argument);
  const ParsedRecord other;
  const std::vector<Contribution> contributions{{&other, 1.0F}};
  EXPECT_THROW(codec.apply({contributions, 0, 1.0F}), std::invalid_argument);
  views[1].elements = 5;
  EXPECT_THROW((void)codec.encode(views, 0, 0.5F), std::invalid_argument);
  views.pop_back();
  EXPECT_THROW(codec.begin(views), std::invalid_argument);
}

TEST(WeightsCodecState, NothingToExchangeIsNoError) {
  WeightsCodec codec(Geometry(std::vector<std::size_t>{0}), {});
  const std::vector<TensorView> views{{nullptr, kernels::DType::f32, 0}};
  EXPECT_EQ(codec.begin(views), std::nullopt);
  const Step step = codec.advance(views, 0, nullptr, 1.0F, 1.0F);
  EXPECT_TRUE(step.record.empty());
  EXPECT_EQ(step.move_mean, 0.0);
  EXPECT_EQ(codec.parse(step.record, 0).first.size(), 1U);
}

#if defined(__SSE2__)
TEST(WeightsCodecState, FlushingSubnormalsInTheScriptChangesNoBit) {
  const auto run = [](unsigned mode) {
    Simulation simulation(float_tensors(), {6, 32}, {.ranks = 2});
    for (int step = 0; step < 4; ++step) {
      for (Module& module : simulation.modules) {
        module.set(0, 1, 0.0);
        module.set(0, 2, 3e-39);
      }
      const unsigned before = _mm_getcsr();
      _mm_setcsr(before | mode);
      simulation.step(0.0);
      EXPECT_EQ(_mm_getcsr() & 0x8040U, mode);
      _mm_setcsr(before);
    }
    return std::pair(Snapshot(simulation), simulation.last[0].record);
  };
  EXPECT_EQ(run(0x8040), run(0));  // FTZ and DAZ
}
#endif

}  // namespace
}  // namespace distro::plugins
