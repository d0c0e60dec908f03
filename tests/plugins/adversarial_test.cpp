#include <fmt/format.h>
#include <gtest/gtest.h>
#include <tbb/global_control.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <utility>

#include "gradient_ranks.h"
#include "plugins/gradient_layout.h"
#include "plugins/weights_defaults.h"
#include "tests/golden.h"
#include "tests/kernels/isas.h"
#include "tests/seed.h"

/// Random shapes, types and settings, and the values that rounding, selection and summation find
/// hardest: whole codecs have the same bits with every instruction set and number of threads.
namespace distro::plugins {
namespace {

using kernels::DType;
using kernels::Isa;

constexpr int kThreads = 4;
constexpr std::size_t kTrials = 3;  // of each kind of values

std::uint32_t printed_seed() {
  const auto seed = test::seed();
  fmt::print("seed {}\n", seed);
  return seed;
}

template <class Element>
Element one_of(std::mt19937& random, std::initializer_list<Element> elements) {
  return elements.begin()[random() % elements.size()];
}

bool coin(std::mt19937& random) { return random() % 2 == 0; }

double with_sign(std::mt19937& random, double value) { return coin(random) ? value : -value; }

/// The largest number of the type that is finite to the codecs.
double largest(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 0x1.fffffep99;
    case DType::f64:
      return 0x1.fffffffffffffp99;
    case DType::f16:
      return 65504;
    case DType::bf16:
      return 0x1.fep99;
  }
  return 0.0;
}

/// The smallest subnormal of the type; of f64 now and then one that fp32 has not.
double smallest(std::mt19937& random, DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 0x1p-149;
    case DType::f64:
      return one_of(random, {0x1p-149, 0x1p-150, 0x1p-1074});
    case DType::f16:
      return 0x1p-24;
    case DType::bf16:
      return 0x1p-133;
  }
  return 0.0;
}

struct Kind {
  const char* name;
  /// Value i of n.
  double (*draw)(std::mt19937& random, DType dtype, std::size_t i, std::size_t n);
};

constexpr Kind kKinds[] = {
    {"uniform", [](std::mt19937& random, DType, std::size_t,
                   std::size_t) { return 0x1p-31 * static_cast<std::int32_t>(random()); }},
    {"all magnitudes",
     [](std::mt19937& random, DType dtype, std::size_t, std::size_t) {
       const int exponent = dtype == DType::f16 ? -25 + static_cast<int>(random() % 40)
                                                : -151 + static_cast<int>(random() % 250);
       return std::ldexp(1.0 + 0x1p-32 * static_cast<double>(random()), exponent) *
              (coin(random) ? 1 : -1);
     }},
    {"subnormals",
     [](std::mt19937& random, DType dtype, std::size_t, std::size_t) {
       const double unit = smallest(random, dtype);
       return with_sign(random, unit * static_cast<double>(random() % 50));
     }},
    {"ties",
     [](std::mt19937& random, DType, std::size_t, std::size_t) {
       return with_sign(random, one_of(random, {0.25, 0.5, 1.0, 0.0}));
     }},
    {"all equal", [](std::mt19937&, DType, std::size_t, std::size_t) { return -0.25; }},
    {"zeros",
     [](std::mt19937& random, DType, std::size_t, std::size_t) { return with_sign(random, 0.0); }},
    {"one huge",
     [](std::mt19937& random, DType dtype, std::size_t i, std::size_t n) {
       return with_sign(random, i == n / 3 ? largest(dtype) : 16 * smallest(random, dtype));
     }},
};

/// What a run left, by names that are in order.
class Seen {
 public:
  template <class Value>
  void add(std::string what, const Value& value) {
    test::Hash hash;
    hash.add(value);
    all_.emplace_back(std::move(what), hash.value());
  }
  bool operator==(const Seen&) const = default;

  /// The first thing that differs.
  [[nodiscard]] std::string difference(const Seen& other) const {
    const auto [mine, theirs] = std::ranges::mismatch(all_, other.all_);
    return mine == all_.end() || theirs == other.all_.end() ? "the number of things" : mine->first;
  }

 private:
  std::vector<std::pair<std::string, std::uint64_t>> all_;
};

/// run(isa, threads) must see the same however it is run.
template <class Run>
void expect_one_outcome(const Run& run) {
  const Seen expected = run(Isa::scalar, 1);
  const auto expect = [&](Isa isa, int threads) {
    const Seen seen = run(isa, threads);
    EXPECT_TRUE(seen == expected) << "isa " << static_cast<int>(isa) << ", " << threads
                                  << " threads: " << expected.difference(seen) << " differs";
  };
  for (const Isa isa : kernels::isas()) {
    if (isa != Isa::scalar) {
      expect(isa, 1);
    }
  }
  expect(kernels::best_isa(), kThreads);
}

bool all_finite(std::span<const float> values) {
  return std::ranges::all_of(values, [](float value) { return std::isfinite(value); });
}

struct WeightsTrial {
  WeightsTrial(std::uint32_t number, const Kind& values) : seed(number), kind(&values) {
    std::mt19937 random(seed);
    do {
      const auto elements = one_of<std::size_t>(
          random, {0, 1, 16, random() % 300, 4096, 4097, random() % 9000, 3 * 4096 + 5});
      tensors.push_back({elements, kernels::kDTypes[random() % 4]});
    } while (random() % 4 != 0);
    config.k = one_of(random, {1U, 6U, 10U, 32U, 700U, 4096U});
    config.value_bits = one_of(random, {1U, 32U});
    config.spread_steps = one_of(random, {0U, 0U, 5U});
    config.residual_bits = one_of(random, {32U, 32U, 16U});
    turns = one_of<std::size_t>(random, {1, 1, 3, default_turns(config.k)});
    share = one_of(random, {0.0F, 0.35F, 1.0F});
    gain = one_of(random, {1.0F, 1.7F});
    steps = 4 + turns;
  }

  /// The optimizer's step: everything is new, a half is, or all weights move.
  void draw(std::mt19937& random, Module& module) const {
    const auto how = random() % 3;
    for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
      const auto [n, dtype] = tensors[tensor];
      for (std::size_t i = 0; i < n; ++i) {
        const double value = kind->draw(random, dtype, i, n);
        if (how == 0 || (how == 1 && coin(random))) {
          module.set(tensor, i, value);
        } else if (how == 2) {
          module.set(tensor, i, module.get(tensor, i) + value / 16);
        }
      }
    }
  }

  std::uint32_t seed;
  const Kind* kind;
  std::vector<Module::Tensor> tensors;
  WeightsConfig config;
  std::size_t turns = 1;
  float share = 0.0F;
  float gain = 0.0F;
  std::size_t steps = 0;
};

/// Two participants, until their weights are no longer finite.
Seen outcome(const WeightsTrial& trial, Isa isa) {
  Seen seen;
  std::mt19937 random(trial.seed + 1);
  Module begin(trial.tensors);
  for (std::size_t tensor = 0; tensor < trial.tensors.size(); ++tensor) {
    const auto [n, dtype] = trial.tensors[tensor];
    for (std::size_t i = 0; i < n; ++i) {
      begin.set(tensor, i, trial.kind->draw(random, dtype, i, n));
    }
  }
  std::vector<Module> modules(2, begin);
  std::vector<WeightsCodec> codecs;
  WeightsConfig config = trial.config;
  config.isa = isa;
  for (Module& module : modules) {
    codecs.emplace_back(module.geometry(trial.turns), config);
    EXPECT_FALSE(codecs.back().begin(module.views()));
  }

  std::vector<ParsedRecord> in_flight;
  bool diverged = false;
  for (std::size_t number = 1; number <= trial.steps && !diverged; ++number) {
    const std::vector<Contribution> contributions = equal_weights(in_flight);
    std::vector<ParsedRecord> sent;
    for (std::size_t rank = 0; rank < modules.size(); ++rank) {
      trial.draw(random, modules[rank]);
      const Due due{contributions, rank, trial.gain};
      const Step step =
          codecs[rank].advance(modules[rank].views(), number, in_flight.empty() ? nullptr : &due,
                               trial.share, trial.share);
      const std::string where = fmt::format(" of step {} of rank {}", number, rank);
      seen.add("the record" + where, step.record);
      seen.add("the mean move" + where, step.move_mean);
      seen.add("the non-finite tensor" + where, step.non_finite.value_or(trial.tensors.size()));
      diverged |= step.non_finite.has_value();
      if (!diverged) {
        sent.push_back(codecs[rank].parse(step.record, number));
      }
      // f16 has no room for all that huge weights of a shared run make of its own.
      diverged |= codecs[rank].first_non_finite(modules[rank].views()).has_value();
    }
    in_flight = std::move(sent);
  }

  for (std::size_t rank = 0; rank < modules.size(); ++rank) {
    const auto state = codecs[rank].state(modules[rank].views(), trial.share);
    for (std::size_t tensor = 0; tensor < trial.tensors.size(); ++tensor) {
      const std::string where = fmt::format(" of tensor {} of rank {}", tensor, rank);
      const std::vector<float>& w = state[tensor].reference;
      const std::vector<float>& r = state[tensor].residual;
      EXPECT_TRUE(diverged || (all_finite(w) && all_finite(r))) << where;
      seen.add("W" + where, w);
      seen.add("R" + where, r);
      seen.add("x" + where, modules[rank].bytes()[tensor]);
    }
    const std::uint64_t checksum = codecs[rank].checksum();
    seen.add("the checksum", checksum);
    EXPECT_TRUE(diverged || checksum == codecs[0].checksum());
    codecs[rank].rehash();
    EXPECT_EQ(codecs[rank].checksum(), checksum);
  }
  return seen;
}

TEST(AdversarialWeights, InstructionSetsAndThreadsChangeNoBit) {
  std::mt19937 random(printed_seed());
  const tbb::global_control allow(tbb::global_control::max_allowed_parallelism, kThreads);
  for (const Kind& kind : kKinds) {
    for (std::size_t i = 0; i < kTrials; ++i) {
      const WeightsTrial trial(static_cast<std::uint32_t>(random()), kind);
      SCOPED_TRACE(fmt::format("{}, trial {}", kind.name, i));
      expect_one_outcome([&](Isa isa, int threads) {
        return tbb::task_arena(threads).execute([&] { return outcome(trial, isa); });
      });
    }
  }
}

/// A number that counts as non-finite in a tensor of this type.
double bad_value(std::mt19937& random, DType dtype) {
  const double infinity = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  return with_sign(random, one_of(random, {infinity, nan, dtype == DType::f16 ? 65520 : 0x1p100}));
}

/// Bits of all that a codec keeps and of what the script owns.
Seen state_of(WeightsCodec& codec, const Module& module) {
  Seen seen;
  for (std::size_t tensor = 0; tensor < module.tensors().size(); ++tensor) {
    seen.add("W", codec.reference(tensor));
    seen.add("R", codec.residual(tensor));
    seen.add("x", module.bytes()[tensor]);
  }
  seen.add("the checksum", codec.checksum());
  return seen;
}

TEST(AdversarialWeights, NonFiniteOnesAreNamedAtTheirTurn) {
  std::mt19937 random(printed_seed());
  std::size_t refused = 0;
  std::size_t unseen = 0;
  for (int i = 0; i < 40; ++i) {
    SCOPED_TRACE(fmt::format("trial {}", i));
    const WeightsTrial trial(static_cast<std::uint32_t>(random()), kKinds[0]);
    const std::size_t turns = trial.turns;
    Module module(trial.tensors);
    module.move(random, 1.0);
    WeightsCodec codec(module.geometry(turns), trial.config);
    codec.begin(module.views());
    const ParsedRecord own =
        codec.parse(codec.advance(module.views(), 1, nullptr, 0.5F, 0.5F).record, 1);
    const std::vector<Contribution> contributions{{&own, 1.0F}};
    const Due due{contributions, 0, 1.7F};
    module.move(random, 0.1);

    // With the exchange of turn 1 due, or (encode) without it.
    const bool encodes = coin(random);
    std::size_t first_bad = trial.tensors.size();
    bool looked_at = false;
    for (std::size_t bad = 1 + random() % 3; bad > 0; --bad) {
      const std::size_t tensor = random() % trial.tensors.size();
      const auto [n, dtype] = trial.tensors[tensor];
      if (n > 0) {
        const std::size_t at = random() % n;
        module.set(tensor, at, bad_value(random, dtype));
        first_bad = std::min(first_bad, tensor);
        const std::size_t turn = at / kTurnElements % turns;
        looked_at |= turn == 2 % turns || (!encodes && turn == 1 % turns);
      }
    }
    const bool is_bad = first_bad < trial.tensors.size();
    EXPECT_EQ(codec.first_non_finite(module.views()),
              is_bad ? std::optional(first_bad) : std::nullopt);
    if (is_bad) {
      const Seen before = state_of(codec, module);
      EXPECT_EQ(codec.begin(module.views()), first_bad);
      EXPECT_TRUE(state_of(codec, module) == before);
    }
    const Step step = encodes ? codec.encode(module.views(), 2, 0.5F)
                              : codec.advance(module.views(), 2, &due, 0.5F, 0.5F);
    if (!looked_at) {
      EXPECT_EQ(step.non_finite, std::nullopt);
      unseen += is_bad ? 1U : 0U;
      continue;
    }
    ++refused;
    EXPECT_EQ(step.non_finite, first_bad);
    EXPECT_TRUE(step.record.empty());
    EXPECT_EQ(codec.follow(module.views(), 2, &due, 0.5F, 0.5F).non_finite, first_bad);
  }
  EXPECT_GT(refused, 0U);
  EXPECT_GT(unseen, 0U);
}

struct GradientTrial {
  GradientTrial(std::uint32_t number, const Kind& values) : seed(number), kind(&values) {
    std::mt19937 random(seed);
    do {
      const auto side = [&] { return static_cast<std::int64_t>(1 + random() % 100); };
      const std::int64_t first = side();
      const std::int64_t second = side();
      const auto few = static_cast<std::int64_t>(random() % 4);
      const std::vector<std::int64_t> shapes[] = {
          {}, {first * second}, {first, second}, {first, second}, {few, first, 1, second}};
      tensors.push_back({shapes[random() % std::size(shapes)], kernels::kDTypes[random() % 4]});
    } while (random() % 4 != 0);
    config.method = one_of(random, {GradientMethod::ef, GradientMethod::demo});
    config.transform = one_of(random, {Transform::dct, Transform::dct, Transform::none});
    config.k = one_of(random, {1U, 6U, 48U, 700U, 4096U});
    config.value_bits = one_of(random, {1U, 32U});
    config.beta = one_of(random, {0.0F, 0.9F, 1.0F});
  }

  void draw(std::mt19937& random, Module& gradients) const {
    for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
      const auto [n, dtype] = gradients.tensors()[tensor];
      for (std::size_t i = 0; i < n; ++i) {
        gradients.set(tensor, i, kind->draw(random, dtype, i, n));
      }
    }
  }

  std::uint32_t seed;
  const Kind* kind;
  std::vector<GradientTensor> tensors;
  GradientConfig config;
};

/// Three steps of two ranks.
Seen outcome(const GradientTrial& trial, Isa isa) {
  Seen seen;
  GradientConfig config = trial.config;
  config.isa = isa;
  std::vector<GradientRank> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    ranks.emplace_back(trial.tensors, config);
  }
  std::mt19937 random(trial.seed + 1);
  for (int step = 0; step < 3; ++step) {
    const std::string where = fmt::format(" of step {}", step);
    std::vector<ParsedRecord> parsed;
    for (GradientRank& rank : ranks) {
      trial.draw(random, rank.gradients);
      const EncodedGradients encoded = rank.encode();
      EXPECT_TRUE(encoded.non_finite.empty());
      seen.add("a record" + where, encoded.record);
      parsed.push_back(rank.codec.parse(encoded.record));
      for (const Residual& residual : rank.residuals) {
        EXPECT_TRUE(all_finite(residual.coefficients));
        seen.add("a residual" + where, residual.coefficients);
      }
    }
    const Module out = decode(ranks[0].codec, ranks[0].gradients, equal_weights(parsed));
    for (std::size_t tensor = 0; tensor < trial.tensors.size(); ++tensor) {
      seen.add("a result" + where, out.bytes()[tensor]);
      for (std::size_t i = 0; i < out.tensors()[tensor].elements; ++i) {
        const double value = out.get(tensor, i);
        const bool overflows = trial.tensors[tensor].dtype == DType::f16 && std::isinf(value);
        if (!std::isfinite(value) && !overflows) {
          ADD_FAILURE() << "tensor " << tensor << " element " << i << where << " is " << value;
          return seen;
        }
      }
    }
  }
  return seen;
}

TEST(AdversarialGradients, InstructionSetsAndThreadsChangeNoBit) {
  std::mt19937 random(printed_seed());
  const tbb::global_control allow(tbb::global_control::max_allowed_parallelism, kThreads);
  for (const Kind& kind : kKinds) {
    for (std::size_t i = 0; i < kTrials; ++i) {
      const GradientTrial trial(static_cast<std::uint32_t>(random()), kind);
      SCOPED_TRACE(fmt::format("{}, trial {}", kind.name, i));
      expect_one_outcome([&](Isa isa, int threads) {
        return tbb::task_arena(threads).execute([&] { return outcome(trial, isa); });
      });
    }
  }
}

TEST(AdversarialGradients, NonFiniteTensorsAreNamedAndChangeNoOther) {
  std::mt19937 random(printed_seed());
  std::size_t refused = 0;
  for (int i = 0; i < 40; ++i) {
    SCOPED_TRACE(fmt::format("trial {}", i));
    const GradientTrial trial(static_cast<std::uint32_t>(random()), kKinds[0]);
    const std::size_t tensors = trial.tensors.size();
    GradientRank poisoned(trial.tensors, trial.config);
    trial.draw(random, poisoned.gradients);
    (void)poisoned.encode();
    trial.draw(random, poisoned.gradients);
    GradientRank clean(trial.tensors, trial.config);
    clean.gradients = poisoned.gradients;
    clean.residuals = poisoned.residuals;
    const std::vector<Residual> before = poisoned.residuals;
    std::vector<std::uint32_t> bad;
    for (std::uint32_t tensor = 0; tensor < tensors; ++tensor) {
      const auto [n, dtype] = poisoned.gradients.tensors()[tensor];
      if (n > 0 && coin(random)) {
        const std::size_t at = random() % n;
        poisoned.gradients.set(tensor, at, bad_value(random, dtype));
        bad.push_back(tensor);
      }
    }
    refused += bad.size();

    const EncodedGradients with = poisoned.encode();
    const EncodedGradients without = clean.encode();
    ASSERT_EQ(with.non_finite, bad);
    const GradientLayout layout(shapes_of(trial.tensors));
    const auto is_bad = [&](std::size_t tensor) { return std::ranges::binary_search(bad, tensor); };
    for (std::size_t t = 0; t < layout.tiles().size(); ++t) {
      if (is_bad(layout.tiles()[t].tensor)) {
        EXPECT_TRUE(with.own.values(t).empty());
      } else {
        EXPECT_TRUE(std::ranges::equal(with.own.indices(t), without.own.indices(t)));
        EXPECT_TRUE(std::ranges::equal(with.own.values(t), without.own.values(t)));
      }
    }
    const Module result = decode(poisoned.codec, poisoned.gradients, {{&with.own, 1.0F}}, bad);
    const Module expected = decode(clean.codec, clean.gradients, {{&without.own, 1.0F}});
    for (std::size_t tensor = 0; tensor < tensors; ++tensor) {
      const Residual& kept = is_bad(tensor) ? before[tensor] : clean.residuals[tensor];
      EXPECT_EQ(poisoned.residuals[tensor].coefficients, kept.coefficients);
      if (!is_bad(tensor)) {
        EXPECT_EQ(result.bytes()[tensor], expected.bytes()[tensor]);
        continue;
      }
      for (std::size_t j = 0; j < result.tensors()[tensor].elements; ++j) {
        ASSERT_TRUE(std::isnan(result.get(tensor, j)));
      }
    }
  }
  EXPECT_GT(refused, 0U);
}

}  // namespace
}  // namespace distro::plugins
