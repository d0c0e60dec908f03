// The codec over a DDP bucket of 25 MiB of fp32, beside a memcpy of the same bytes in this process:
// `ratio` is the best time over the memcpy's best time with the same number of threads. Targets:
// performance.md.
#include <benchmark/benchmark.h>
#include <tbb/global_control.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "plugins/gradient.h"
#include "plugins/weights.h"

namespace distro::plugins {
namespace {

constexpr std::size_t kElements = 6553600;
constexpr std::size_t kPeers = 8;

double seconds(const auto& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// The bucket that is copied for comparison.
struct Copy {
  void operator()() {
    constexpr std::size_t kBlock = 65536;
    tbb::parallel_for(std::size_t{0}, kElements / kBlock, [&](std::size_t block) {
      std::memcpy(&to[block * kBlock], &from[block * kBlock], kBlock * sizeof(float));
    });
    benchmark::ClobberMemory();
  }
  std::vector<float> from = std::vector<float>(kElements, 1.0F);
  std::vector<float> to = std::vector<float>(kElements);
};

/// A module, its codec, and what kPeers participants sent.
struct Bucket {
  explicit Bucket(WeightsConfig config, std::size_t turns = 1)
      : x(kElements),
        codec(Geometry(std::vector<std::size_t>{kElements}, turns), config),
        views{{x.data(), kernels::DType::f32, kElements}} {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> moves(1 << 20);
    for (float& move : moves) {
      move = 1e-2F * normal(random);
    }
    codec.begin(views);
    for (std::size_t peer = 0; peer < kPeers; ++peer) {
      for (std::size_t i = 0; i < kElements; ++i) {
        x[i] += moves[(i + peer * 7919) % moves.size()];
      }
      bodies.push_back(codec.encode(views, 0, 0.5F).record);
      records.push_back(codec.parse(bodies.back(), 0));
    }
    for (const ParsedRecord& record : records) {
      contributions.push_back({&record, 1.0F / kPeers});
    }
  }
  std::vector<float> x;
  WeightsCodec codec;
  std::vector<TensorView> views;
  std::vector<std::vector<std::byte>> bodies;
  std::vector<ParsedRecord> records;
  std::vector<Contribution> contributions;
};

template <class Work>
void measure(benchmark::State& state, const Work& work) {
  const auto threads = static_cast<int>(state.range(0));
  tbb::task_arena arena(threads);
  Copy copy;
  double least = 1e9;
  double least_copy = 1e9;
  for (auto _ : state) {  // in turn, so that both see the same machine and a cold cache
    least_copy = std::min(least_copy, seconds([&] { arena.execute(std::ref(copy)); }));
    const double took = seconds([&] { arena.execute(work); });
    state.SetIterationTime(took);
    least = std::min(least, took);
  }
  state.counters["best_ms"] = least * 1e3;
  state.counters["ratio"] = least / least_copy;
}

void sync(benchmark::State& state, WeightsConfig config) {
  Bucket bucket(config);
  const Due due{std::span(bucket.contributions).first(1), 0, 1.0F};
  measure(state, [&] { bucket.codec.advance(bucket.views, 0, &due, 0.5F, 0.5F); });
}

/// The exchange that is due is of the turn before.
void sync_in_turns(benchmark::State& state, WeightsConfig config) {
  Bucket bucket(config, default_turns(config.k));
  const Due due{bucket.contributions, 0, 1.0F};
  measure(state, [&] { bucket.codec.advance(bucket.views, 1, &due, 0.5F, 0.5F); });
}

void sync_8_peers(benchmark::State& state, WeightsConfig config) {
  Bucket bucket(config);
  const Due due{bucket.contributions, 0, 1.0F};
  measure(state, [&] { bucket.codec.advance(bucket.views, 0, &due, 0.5F, 0.5F); });
}

void apply_8_peers(benchmark::State& state, WeightsConfig config) {
  Bucket bucket(config);
  const Due due{bucket.contributions, 0, 1.0F};
  measure(state, [&] { bucket.codec.apply(due); });
}

void parse_8_peers(benchmark::State& state, WeightsConfig config) {
  const Bucket bucket(config);
  measure(state, [&] {
    for (const std::vector<std::byte>& body : bucket.bodies) {
      benchmark::DoNotOptimize(bucket.codec.parse(body, 0));
    }
  });
}

/// A gradient bucket of one square-ish matrix, its codec, and what kPeers ranks sent.
struct GradientBucket {
  explicit GradientBucket(GradientConfig config)
      : codec({{2560, kElements / 2560}}, config), gradient(kElements) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> noise(1 << 20);
    for (float& value : noise) {
      value = 1e-2F * normal(random);
    }
    for (std::size_t peer = 0; peer < kPeers; ++peer) {
      for (std::size_t i = 0; i < kElements; ++i) {
        gradient[i] = noise[(i + peer * 7919) % noise.size()];
      }
      records.push_back(codec.parse(encode().record));
    }
    for (const ParsedRecord& record : records) {
      contributions.push_back({&record, 1.0F / kPeers});
    }
  }
  EncodedGradients encode() {
    Residual* const residuals[] = {&residual};
    return codec.encode(views(), residuals);
  }
  std::vector<TensorView> views() { return {{gradient.data(), kernels::DType::f32, kElements}}; }

  GradientCodec codec;
  std::vector<float> gradient;
  Residual residual;
  std::vector<ParsedRecord> records;
  std::vector<Contribution> contributions;
};

void gradient_encode(benchmark::State& state, GradientConfig config) {
  GradientBucket bucket(config);
  measure(state, [&] { benchmark::DoNotOptimize(bucket.encode()); });
}

void gradient_decode(benchmark::State& state, GradientConfig config, std::size_t peers) {
  GradientBucket bucket(config);
  measure(state, [&] {
    bucket.codec.decode(std::span(bucket.contributions).first(peers), {}, bucket.views());
  });
}

constexpr GradientConfig ef(kernels::Isa isa, Transform transform = Transform::dct) {
  return {GradientMethod::ef, 6, 1, transform, 1.0F, isa};
}

constexpr WeightsConfig with(kernels::Isa isa, std::uint32_t k = 6) { return {k, 1, isa}; }

BENCHMARK_CAPTURE(sync, scalar, with(kernels::Isa::scalar))->Arg(1)->UseManualTime();
BENCHMARK_CAPTURE(sync, avx2, with(kernels::Isa::avx2))->Arg(1)->UseManualTime();
BENCHMARK_CAPTURE(sync, avx512, with(kernels::Isa::avx512))->Arg(1)->Arg(2)->UseManualTime();
BENCHMARK_CAPTURE(sync, k48, with(kernels::Isa::avx512, 48))->Arg(1)->UseManualTime();
BENCHMARK_CAPTURE(sync_in_turns, k10, with(kernels::Isa::avx512, 10))
    ->Arg(1)
    ->Arg(2)
    ->UseManualTime();
BENCHMARK_CAPTURE(sync_8_peers, k6, with(kernels::Isa::avx512))->Arg(1)->Arg(2)->UseManualTime();
BENCHMARK_CAPTURE(apply_8_peers, k6, with(kernels::Isa::avx512))->Arg(1)->Arg(2)->UseManualTime();
BENCHMARK_CAPTURE(parse_8_peers, k6, with(kernels::Isa::avx512))->Arg(1)->Arg(2)->UseManualTime();

using kernels::Isa;
BENCHMARK_CAPTURE(gradient_encode, scalar, ef(Isa::scalar))->Arg(1)->UseManualTime();
BENCHMARK_CAPTURE(gradient_encode, avx2, ef(Isa::avx2))->Arg(1)->UseManualTime();
BENCHMARK_CAPTURE(gradient_encode, avx512, ef(Isa::avx512))->Arg(1)->Arg(2)->UseManualTime();
BENCHMARK_CAPTURE(gradient_encode, none, ef(Isa::avx512, Transform::none))->Arg(1)->UseManualTime();
BENCHMARK_CAPTURE(gradient_decode, 1_peer, ef(Isa::avx512), 1)->Arg(1)->UseManualTime();
BENCHMARK_CAPTURE(gradient_decode, 8_peers, ef(Isa::avx512), 8)->Arg(1)->Arg(2)->UseManualTime();

}  // namespace
}  // namespace distro::plugins
