// Kernels over a DDP bucket of 25 MiB of fp32, tile by tile, beside a memcpy of the same bytes.
// `ratio` is the time over that of the memcpy in this process (performance.md gives the targets).
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/aligned.h"
#include "kernels/kernels.h"

namespace distro::kernels {
namespace {

constexpr std::size_t kElements = 6553600;

struct Bucket {
  Bucket() : x(kElements), w(kElements), r(kElements) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < kElements; ++i) {
      w[i] = normal(random);
      r[i] = 1e-2F * normal(random);
      x[i] = w[i] + r[i];
    }
  }
  AlignedVector<float> x, w, r;
};

Bucket& bucket() {
  static Bucket shared;
  return shared;
}

double seconds(const auto& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

template <class Work>
void over_tiles(benchmark::State& state, std::int64_t bytes, const Work& work) {
  static AlignedVector<float> to(kElements);
  double least = 1e9;
  double least_copy = 1e9;
  for (auto _ : state) {  // in turn, so that both see the same machine and a cold cache
    least_copy = std::min(least_copy, seconds([&] {
                            std::memcpy(to.data(), bucket().x.data(), kElements * sizeof(float));
                            benchmark::ClobberMemory();
                          }));
    const double took = seconds([&] {
      for (std::size_t begin = 0; begin < kElements; begin += kTileElements) {
        work(begin);
      }
    });
    state.SetIterationTime(took);
    least = std::min(least, took);
  }
  state.SetBytesProcessed(state.iterations() * bytes * static_cast<std::int64_t>(kElements));
  state.counters["best_ms"] = least * 1e3;
  state.counters["ratio"] = least / least_copy;
}

void absorb(benchmark::State& state, Isa isa) {
  Bucket& b = bucket();
  over_tiles(state, 16, [&](std::size_t i) {
    table(isa).absorb(DType::f32, &b.x[i], &b.w[i], &b.r[i], kTileElements, 0.5F);
  });
}

void restore(benchmark::State& state, Isa isa) {
  Bucket& b = bucket();
  over_tiles(state, 12, [&](std::size_t i) {
    table(isa).restore(DType::f32, &b.x[i], &b.w[i], &b.r[i], kTileElements, 0.5F);
  });
}

void finite(benchmark::State& state, Isa isa) {
  Bucket& b = bucket();
  over_tiles(state, 4, [&](std::size_t i) {
    benchmark::DoNotOptimize(table(isa).finite(DType::f32, &b.x[i], kTileElements));
  });
}

void select(benchmark::State& state, Isa isa) {
  Bucket& b = bucket();
  std::vector<std::uint16_t> index(kTileElements);
  const auto k = static_cast<std::size_t>(state.range(0));
  over_tiles(state, 4, [&](std::size_t i) {
    table(isa).select(&b.r[i], kTileElements, k, index.data());
    benchmark::DoNotOptimize(index.data());
  });
}

void checksum(benchmark::State& state, Isa isa) {
  Bucket& b = bucket();
  over_tiles(state, 4, [&](std::size_t i) {
    benchmark::DoNotOptimize(table(isa).checksum(&b.w[i], kTileElements, i));
  });
}

void copy(benchmark::State& state) {
  static AlignedVector<float> to(kElements);
  over_tiles(state, 8, [&](std::size_t i) {
    std::memcpy(&to[i], &bucket().x[i], kTileElements * sizeof(float));
  });
}

BENCHMARK(copy)->UseManualTime();
#define DISTRO_KERNEL_BENCHMARK(kernel)                            \
  BENCHMARK_CAPTURE(kernel, scalar, Isa::scalar)->UseManualTime(); \
  BENCHMARK_CAPTURE(kernel, avx2, Isa::avx2)->UseManualTime();     \
  BENCHMARK_CAPTURE(kernel, avx512, Isa::avx512)->UseManualTime()
DISTRO_KERNEL_BENCHMARK(absorb);
DISTRO_KERNEL_BENCHMARK(restore);
DISTRO_KERNEL_BENCHMARK(finite);
DISTRO_KERNEL_BENCHMARK(checksum);
BENCHMARK_CAPTURE(select, scalar, Isa::scalar)->Arg(6)->UseManualTime();
BENCHMARK_CAPTURE(select, avx2, Isa::avx2)->Arg(6)->UseManualTime();
BENCHMARK_CAPTURE(select, avx512, Isa::avx512)
    ->Arg(6)
    ->Arg(16)
    ->Arg(48)
    ->Arg(64)
    ->Arg(512)
    ->Arg(4096)
    ->UseManualTime();

}  // namespace
}  // namespace distro::kernels
