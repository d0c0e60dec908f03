// What the codec costs: each operation on weights or gradients of a bucket, beside a memcpy of the
// same bytes with the same threads, one after the other. `torch-distro bench codec` runs it.
#include <benchmark/benchmark.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/aligned.h"
#include "plugins/gradient.h"
#include "plugins/weights.h"
#include "plugins/weights_defaults.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace distro::plugins {
namespace {

// DDP's default bucket: 25 MiB of fp32.
constexpr std::size_t kBucketElements = 6553600;
constexpr std::uint32_t kGradientK = 6;
constexpr std::uint32_t kWeightsK = 10;

// As torch's tensors, what is measured begins with a cache line.
using kernels::AlignedVector;

double seconds(const auto& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::ranges::nth_element(values, middle);
  return *middle;
}

/// What is copied for comparison: as many bytes as `elements` fp32 have.
class Copy {
 public:
  explicit Copy(std::size_t elements) : from_(elements, 1.0F), to_(kShift + elements) {}

  void operator()() {
    constexpr std::size_t kBlock = 65536;
    tbb::parallel_for(std::size_t{0}, (from_.size() + kBlock - 1) / kBlock, [&](std::size_t block) {
      const std::size_t begin = block * kBlock;
      const std::size_t n = std::min(kBlock, from_.size() - begin);
      std::memcpy(&to_[kShift + begin], &from_[begin], n * sizeof(float));
    });
    benchmark::ClobberMemory();
  }

 private:
  // Half a page: a load and an earlier store at the same place of a page wait for each other.
  static constexpr std::size_t kShift = 512;
  AlignedVector<float> from_;
  AlignedVector<float> to_;
};

/// Values of a normal distribution, other ones for each participant.
class Noise {
 public:
  Noise() : values_(1 << 20) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::ranges::generate(values_, [&] { return 1e-2F * normal(random); });
  }
  [[nodiscard]] float operator()(std::size_t i, std::size_t participant) const {
    return values_[(i + participant * 7919) % values_.size()];
  }

 private:
  std::vector<float> values_;
};

const Noise& noise() {
  static const Noise values;
  return values;
}

/// One row: an operation in a setting.
struct Row {
  std::size_t elements = kBucketElements;
  int threads = 1;
  kernels::Isa isa = kernels::best_isa();
  kernels::DType dtype = kernels::DType::f32;
  std::size_t peers = 1;
  std::uint32_t k = kWeightsK;
  std::size_t turns = 1;
  float share = 0.5F;
  std::uint32_t spread = 0;
  std::uint32_t residual_bits = 32;
  Transform transform = Transform::dct;
  tbb::task_arena* arena = nullptr;  ///< Of the codec; null: the caller's.
};

std::vector<Contribution> contributions_of(const std::vector<ParsedRecord>& records) {
  std::vector<Contribution> contributions;
  for (const ParsedRecord& record : records) {
    contributions.push_back({&record, 1.0F / static_cast<float>(records.size())});
  }
  return contributions;
}

double log2_choose(double n, double k) {
  return (std::lgamma(n + 1) - std::lgamma(k + 1) - std::lgamma(n - k + 1)) / std::log(2.0);
}

/// One tensor of weights, its codec, and what each peer sent at the exchange before.
class Weights {
 public:
  explicit Weights(const Row& row)
      : row_(row),
        values_(row.elements),
        x_(row.elements * kernels::size_of(row.dtype)),
        views_{{x_.data(), row.dtype, row.elements}},
        codec_(Geometry(std::vector{row.elements}, row.turns),
               {.k = row.k,
                .value_bits = 1,
                .isa = row.isa,
                .arena = row.arena,
                .spread_steps = row.spread,
                .residual_bits = row.residual_bits}) {
    codec_.begin(views_);
    for (std::size_t peer = 0; peer < row.peers; ++peer) {
      move();
      bodies_.push_back(codec_.encode(views_, number_, row.share).record);
      records_.push_back(codec_.parse(bodies_.back(), number_));
    }
    contributions_ = contributions_of(records_);
  }

  /// What an optimizer does before each exchange.
  void move() {
    const kernels::KernelTable& table = kernels::table(row_.isa);
    for (std::size_t begin = 0; begin < row_.elements; begin += kernels::kTileElements) {
      const std::size_t n = std::min(kernels::kTileElements, row_.elements - begin);
      std::byte* const x = x_.data() + begin * kernels::size_of(row_.dtype);
      float* const values = values_.data() + begin;
      table.adopt(row_.dtype, x, values, n);
      for (std::size_t i = 0; i < n; ++i) {
        values[i] += noise()(begin + i, moves_);
      }
      table.scatter(row_.dtype, values, x, n, 1, n, kernels::Store::cached);
    }
    ++moves_;
  }

  /// As with DISTRO_DELAY=1; the next exchange applies what this one sends.
  void sync() {
    const Due due{contributions_, 0, gain()};
    body_ = codec_.advance(views_, ++number_, &due, row_.share, row_.share).record;
  }
  void take_own() { records_.front() = codec_.parse(body_, number_); }

  void apply() { codec_.apply({contributions_, 0, 1.0F}); }
  void parse() const {
    for (const std::vector<std::byte>& body : bodies_) {
      benchmark::DoNotOptimize(codec_.parse(body, 0));
    }
  }

  /// Of a tile that was looked at: what was sent, and what the places alone need at least, with a
  /// sign each.
  void count_bits(benchmark::State& state) const {
    const auto tiles = codec_.geometry().tiles(0);
    const auto k = kept_of_turn(row_.k, row_.turns);
    double entropy = 0.0;
    for (const Tile& tile : tiles) {
      const auto kept = static_cast<double>(TileLayout::kept(k, tile.elements));
      entropy += log2_choose(static_cast<double>(tile.elements), kept) + kept;
    }
    const auto number = static_cast<double>(tiles.size());
    state.counters["bits_a_tile"] = 8.0 * static_cast<double>(bodies_.front().size()) / number;
    state.counters["entropy_bits_a_tile"] = entropy / number;
  }

 private:
  /// So that a gain is spread where the row says so.
  [[nodiscard]] float gain() const { return row_.spread > 0 ? 2.0F : 1.0F; }

  Row row_;
  std::size_t moves_ = 0;
  std::uint64_t number_ = 0;
  AlignedVector<float> values_;
  AlignedVector<std::byte> x_;
  std::vector<TensorView> views_;
  WeightsCodec codec_;
  std::vector<std::byte> body_;
  std::vector<std::vector<std::byte>> bodies_;
  std::vector<ParsedRecord> records_;
  std::vector<Contribution> contributions_;
};

/// The gradient of one matrix, its codec, and what each peer sent.
class Gradients {
 public:
  explicit Gradients(const Row& row)
      : codec_({{kRows, static_cast<std::int64_t>(row.elements) / kRows}},
               {GradientMethod::ef, row.k, 1, row.transform, 1.0F, row.isa}),
        gradient_(row.elements * kernels::size_of(row.dtype)),
        views_{{gradient_.data(), row.dtype, row.elements}} {
    AlignedVector<float> values(kernels::kTileElements);
    for (std::size_t peer = 0; peer < row.peers; ++peer) {
      for (std::size_t begin = 0; begin < row.elements; begin += values.size()) {
        const std::size_t n = std::min(values.size(), row.elements - begin);
        for (std::size_t i = 0; i < n; ++i) {
          values[i] = noise()(begin + i, peer);
        }
        kernels::table(row.isa).scatter(row.dtype, values.data(), address(views_.front(), begin), n,
                                        1, n, kernels::Store::cached);
      }
      Residual* const residuals[] = {&residual_};
      records_.push_back(codec_.parse(codec_.encode(views_, residuals).record));
    }
    contributions_ = contributions_of(records_);
  }

  void encode() {
    Residual* const residuals[] = {&residual_};
    benchmark::DoNotOptimize(codec_.encode(views_, residuals));
  }
  void decode() { codec_.decode(contributions_, {}, views_); }

 private:
  static constexpr std::int64_t kRows = 2560;

  GradientCodec codec_;
  AlignedVector<std::byte> gradient_;
  std::vector<TensorView> views_;
  Residual residual_;
  std::vector<ParsedRecord> records_;
  std::vector<Contribution> contributions_;
};

/// Two modules, of half of the weights each, whose syncs run at the same time in one arena.
class Modules {
 public:
  explicit Modules(const Row& row) : arena_(row.threads), one_(half(row)), other_(half(row)) {}

  void move() {
    one_.move();
    other_.move();
  }
  void sync() {
    double other = 0.0;
    double one = 0.0;
    std::jthread thread([&] { other = seconds([&] { other_.sync(); }); });
    one = seconds([&] { one_.sync(); });
    thread.join();
    slower_to_faster_.push_back(std::max(one, other) / std::min(one, other));
  }
  void take_own() {
    one_.take_own();
    other_.take_own();
  }
  [[nodiscard]] double slower_to_faster() const { return median(slower_to_faster_); }

 private:
  [[nodiscard]] Row half(Row row) {
    row.elements /= 2;
    row.arena = &arena_;
    return row;
  }

  tbb::task_arena arena_;
  Weights one_;
  Weights other_;
  std::vector<double> slower_to_faster_;
};

/// Of memory that nobody uses.
std::size_t free_bytes() {
  return static_cast<std::size_t>(sysconf(_SC_AVPHYS_PAGES)) *
         static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

const char* name_of(kernels::Isa isa) {
  switch (isa) {
    case kernels::Isa::scalar:
      return "scalar";
    case kernels::Isa::avx2:
      return "avx2";
    case kernels::Isa::avx512:
      return "avx512";
  }
  return "";
}

template <class Subject>
void nothing(Subject& /*subject*/) {}

/// What is measured, and what else happens in each iteration.
template <class Subject>
struct Operation {
  void (*work)(Subject& subject);
  void (*before)(Subject& subject) = nothing<Subject>;
  void (*after)(Subject& subject) = nothing<Subject>;
};

template <class Subject>
void measure(benchmark::State& state, const Row& row, Subject& subject,
             const Operation<Subject>& operation) {
  tbb::task_arena arena(row.threads);
  Copy copy(row.elements);
  std::vector<double> times;
  std::vector<double> copies;
  arena.execute([&] {  // what is allocated is kept
    operation.before(subject);
    operation.work(subject);
    operation.after(subject);
  });
  for (auto _ : state) {  // in turn, so that both see the same machine and a cold cache
    operation.before(subject);
    copies.push_back(seconds([&] { arena.execute(std::ref(copy)); }));
    times.push_back(seconds([&] { arena.execute([&] { operation.work(subject); }); }));
    operation.after(subject);
    state.SetIterationTime(times.back());
  }
  state.SetLabel(name_of(row.isa));
  state.counters["elements"] = static_cast<double>(row.elements);
  state.counters["threads"] = row.threads;
  state.counters["k"] = row.k;
  state.counters["peers"] = static_cast<double>(row.peers);
  state.counters["milliseconds"] = median(times) * 1e3;
  state.counters["memcpy_milliseconds"] = median(copies) * 1e3;
  state.counters["ratio"] = median(times) / median(copies);
}

/// Registers a row; `floor_bytes`: what the operation moves of memory for each of the weights or
/// gradients, if it reads and writes nothing twice.
template <class Subject>
void add(const std::string& name, const Row& row, double floor_bytes,
         const Operation<Subject>& operation) {
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
    Subject subject(row);
    measure(state, row, subject, operation);
    state.counters["floor_bytes_a_parameter"] = floor_bytes;
    // A memcpy reads 4 and writes 4.
    state.counters["bytes_a_parameter"] = 8.0 * state.counters["ratio"];
    if constexpr (std::is_same_v<Subject, Weights>) {
      subject.count_bits(state);
    } else if constexpr (std::is_same_v<Subject, Modules>) {
      state.counters["slower_to_faster"] = subject.slower_to_faster();
    }
  })->UseManualTime();
}

/// What a sync moves of memory, for each of all weights.
double sync_bytes(const Row& row) {
  const auto x = static_cast<double>(kernels::size_of(row.dtype));
  const double p = row.spread > 0 ? 4.0 : 0.0;
  const bool all_moves_count = row.share == 1.0F;  // then there is no R, and x is W + R as it is
  const double r = all_moves_count ? 0.0 : row.residual_bits / 8.0;
  // Reads x, W, R and P, writes R and P, and x where not only single entries of it change.
  const double of_due = 4.0 + 2 * r + 2 * p + (all_moves_count && p == 0.0 ? x : 2 * x);
  if (row.turns == 1) {
    return of_due;
  }
  // The other turn, of which nothing is due.
  const double of_selecting = 4.0 + 2 * r + p + (all_moves_count ? x : 2 * x);
  return (of_due + of_selecting) / static_cast<double>(row.turns);
}

/// What applying records moves at least: the cache lines of W that have an entry of them, in and
/// out, if entries fall on lines at random.
double apply_bytes(const Row& row) {
  constexpr double kLines = kernels::kTileElements * sizeof(float) / kernels::kCacheLineBytes;
  const auto entries = static_cast<double>(row.peers * row.k);
  const double touched = 1.0 - std::pow(1.0 - 1.0 / kLines, entries);
  return 2 * sizeof(float) * touched;
}

template <class Subject = Weights>
void add_sync(const std::string& name, const Row& row) {
  add<Subject>(name, row, sync_bytes(row),
               {[](Subject& subject) { subject.sync(); }, [](Subject& subject) { subject.move(); },
                [](Subject& subject) { subject.take_own(); }});
}

Row row_of_default(std::size_t elements, int threads) {
  return {.elements = elements, .threads = threads, .turns = default_turns(kWeightsK)};
}

void add_weights(int threads) {
  const std::string of = "/threads:" + std::to_string(threads);
  add_sync("weights_sync" + of, row_of_default(kBucketElements, threads));
  add_sync("weights_sync_one_span" + of, {.threads = threads, .k = kGradientK});
  add_sync("weights_sync_one_span_share_1" + of,
           {.threads = threads, .k = kGradientK, .share = 1.0F});
  add_sync("weights_sync_one_span_residual_16" + of,
           {.threads = threads, .k = kGradientK, .residual_bits = 16});
  Row share_1 = row_of_default(kBucketElements, threads);
  share_1.share = 1.0F;
  add_sync("weights_sync_share_1" + of, share_1);
  add_sync("weights_sync_k_32" + of, {.threads = threads,
                                      .k = 32,
                                      .turns = default_turns(32),
                                      .share = 1.0F,
                                      .spread = default_spread_steps(32, 1)});
  const Row of_peers{.threads = threads, .peers = 8, .k = kGradientK};
  add<Weights>("weights_apply_8_peers" + of, of_peers, apply_bytes(of_peers),
               {[](Weights& weights) { weights.apply(); }});
  add<Weights>("weights_parse_8_peers" + of, of_peers, 0.0,
               {[](Weights& weights) { weights.parse(); }});
}

constexpr Operation<Gradients> kEncode{[](Gradients& gradients) { gradients.encode(); }};
constexpr Operation<Gradients> kDecode{[](Gradients& gradients) { gradients.decode(); }};

void add_gradients(int threads) {
  const std::string of = "/threads:" + std::to_string(threads);
  // Reads the gradient and M, writes M.
  add<Gradients>("ef_encode" + of, {.threads = threads, .k = kGradientK}, 12.0, kEncode);
  add<Gradients>("ef_encode_without_transform" + of,
                 {.threads = threads, .k = kGradientK, .transform = Transform::none}, 12.0,
                 kEncode);
  for (const std::size_t peers : {1U, 8U, 32U}) {
    add<Gradients>("ef_decode_" + std::to_string(peers) + "_peers" + of,
                   {.threads = threads, .peers = peers, .k = kGradientK}, 4.0, kDecode);
  }
}

void add_instruction_sets() {
  for (const auto isa : {kernels::Isa::scalar, kernels::Isa::avx2, kernels::Isa::avx512}) {
    if (kernels::table(isa).isa != isa) {
      continue;
    }
    const std::string of = "/isa:" + std::string(name_of(isa));
    add_sync("weights_sync_one_span" + of, {.isa = isa, .k = kGradientK});
    add<Gradients>("ef_encode" + of, {.isa = isa, .k = kGradientK}, 12.0, kEncode);
  }
}

void add_types_and_sizes() {
  add_sync<Modules>("weights_sync_one_span/modules:2", {.threads = 2, .k = kGradientK});
  for (const auto& [name, dtype] :
       {std::pair{"bf16", kernels::DType::bf16}, {"f16", kernels::DType::f16}}) {
    const std::string of = "/dtype:" + std::string(name);
    add_sync("weights_sync" + of, {.dtype = dtype, .turns = default_turns(kWeightsK)});
    // Reads the gradient and M, writes M.
    add<Gradients>("ef_encode" + of, {.dtype = dtype, .k = kGradientK}, 10.0, kEncode);
    add<Gradients>("ef_decode_8_peers" + of, {.dtype = dtype, .peers = 8, .k = kGradientK}, 2.0,
                   kDecode);
  }
  constexpr std::size_t kMiB = std::size_t{1} << 20;
  for (const std::size_t bytes : {kMiB / 16, kMiB, 16 * kMiB, 128 * kMiB, 1024 * kMiB}) {
    if (6 * bytes > free_bytes()) {  // x, W, R, two of the memcpy, values on their way
      continue;
    }
    add_sync("weights_sync/bytes:" + std::to_string(bytes),
             row_of_default(bytes / sizeof(float), 1));
  }
}

void add_all() {
  const int most = static_cast<int>(std::min(2U, std::thread::hardware_concurrency()));
  for (int threads = 1; threads <= most; ++threads) {
    add_weights(threads);
    add_gradients(threads);
  }
  add_instruction_sets();
  add_types_and_sizes();
}

}  // namespace
}  // namespace distro::plugins

int main(int argc, char** argv) {
#if defined(__GLIBC__)
  // Large memory goes back to the system when it is freed: what a row allocates is as in a new
  // process, with the pages that it asks for.
  mallopt(M_MMAP_THRESHOLD, 1 << 20);
#endif
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 1;
  }
  distro::plugins::add_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
