#include "plugins/weights.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "plugins/fingerprint.h"
#include "plugins/float_environment.h"
#include "plugins/parallel.h"
#include "plugins/record_coder.h"
#include "plugins/weights_tile.h"

namespace distro::plugins {
namespace {

constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();

/// What a task leaves for the caller to add up in run order.
struct RunResult {
  double moved = 0.0;
  std::uint64_t checksum = 0;  ///< Change, or for a dense pass the sum.
  std::size_t non_finite = kNone;
};

}  // namespace

struct WeightsCodec::State {
  State(Geometry cut, WeightsConfig how)
      : geometry(std::move(cut)),
        kernels(kernels::table(how.isa)),
        arena(how.arena),
        coder(geometry.layout(), {how.k, how.value_bits}),
        w(geometry.elements()),
        r(geometry.elements()),
        staging(coder.staging_bytes()),
        bits(geometry.runs().size()),
        results(geometry.runs().size()) {}

  /// What one pass over the tiles does; null parts are left out.
  struct Pass {
    std::span<const TensorView> x;
    const float* absorb = nullptr;  ///< share before
    const Due* due = nullptr;
    bool select = false;
    const float* restore = nullptr;  ///< share after
  };

  [[nodiscard]] std::optional<std::size_t> find_non_finite(std::span<const TensorView> x);
  /// Per tile: absorb, apply, select, restore. Adds up the checksum; returns the sum of |move|.
  double run(const Pass& pass);
  void run_tiles(const Pass& pass, std::size_t run);
  [[nodiscard]] Step step(const Pass& pass);
  [[nodiscard]] std::optional<std::size_t> first_non_finite() const noexcept;
  /// Runs task(run, result) for every run of tiles.
  template <class Task>
  void for_each_run(const Task& task);

  Geometry geometry;
  const kernels::KernelTable& kernels;
  tbb::task_arena* arena;
  RecordCoder coder;
  std::vector<float> w;
  std::vector<float> r;
  std::uint64_t checksum = 0;
  // Kept between steps, so that a step allocates nothing but the record that it returns.
  std::vector<std::byte> staging;
  std::vector<std::size_t> bits;
  std::vector<RunResult> results;
};

template <class Task>
void WeightsCodec::State::for_each_run(const Task& task) {
  in_arena(arena, [&] {
    parallel_for(geometry.runs().size(), [&](std::size_t run) {
      const DefaultFloatEnvironment environment;
      results[run] = {};
      task(run, results[run]);
    });
  });
}

std::optional<std::size_t> WeightsCodec::State::first_non_finite() const noexcept {
  std::size_t first = kNone;
  for (const RunResult& result : results) {
    first = std::min(first, result.non_finite);
  }
  return first == kNone ? std::nullopt : std::optional(first);
}

std::optional<std::size_t> WeightsCodec::State::find_non_finite(std::span<const TensorView> x) {
  for_each_run([&](std::size_t run, RunResult& result) {
    const TileRun& tiles = geometry.runs()[run];
    for (const Tile& tile : geometry.tiles().subspan(tiles.first_tile, tiles.tiles)) {
      if (const auto bad = non_finite_in_tile(kernels, geometry.segments(tile), x)) {
        result.non_finite = std::min(result.non_finite, *bad);
      }
    }
  });
  return first_non_finite();
}

void WeightsCodec::State::run_tiles(const Pass& pass, std::size_t run) {
  const TileRun& tiles = geometry.runs()[run];
  RunResult& result = results[run];
  RunWriter writer = coder.writer(run, staging);
  kernels::SparseSum sum;
  std::array<std::uint16_t, kernels::kTileElements> index{};
  for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
    const Tile& tile = geometry.tiles()[t];
    const std::span<const Segment> segments = geometry.segments(tile);
    float* const tile_w = w.data() + tile.begin;
    float* const tile_r = r.data() + tile.begin;
    if (pass.absorb != nullptr) {
      result.moved += absorb_tile(kernels, segments, pass.x, tile_w, tile_r, *pass.absorb);
    }
    if (pass.due != nullptr) {
      result.checksum += apply_tile(*pass.due, t, tile.begin, tile_w, tile_r, sum);
    }
    if (pass.select) {
      const std::size_t kept = TileLayout::kept(coder.format().k, tile.elements);
      const std::size_t count = kernels.select(tile_r, tile.elements, kept, index.data());
      writer.add(std::span(index).first(count), tile_r);
    }
    if (pass.restore != nullptr) {
      restore_tile(kernels, segments, pass.x, tile_w, tile_r, *pass.restore);
    }
  }
  if (pass.select) {
    bits[run] = writer.finish();
  }
}

double WeightsCodec::State::run(const Pass& pass) {
  for_each_run([&](std::size_t run, RunResult&) { run_tiles(pass, run); });
  double moved = 0.0;
  for (const RunResult& result : results) {
    moved += result.moved;
    checksum += result.checksum;
  }
  return moved;
}

Step WeightsCodec::State::step(const Pass& pass) {
  Step step;
  step.non_finite = find_non_finite(pass.x);
  if (step.non_finite) {
    return step;
  }
  const double moved = run(pass);
  if (geometry.elements() > 0) {
    step.move_mean = moved / static_cast<double>(geometry.elements());
  }
  if (pass.select) {
    step.record = in_arena(arena, [&] { return coder.assemble(staging, bits); });
  }
  return step;
}

WeightsCodec::WeightsCodec(Geometry geometry, WeightsConfig config)
    : state_(std::make_unique<State>(std::move(geometry), config)) {}
WeightsCodec::~WeightsCodec() = default;
WeightsCodec::WeightsCodec(WeightsCodec&&) noexcept = default;
WeightsCodec& WeightsCodec::operator=(WeightsCodec&&) noexcept = default;

const Geometry& WeightsCodec::geometry() const noexcept { return state_->geometry; }

std::optional<std::size_t> WeightsCodec::first_non_finite(Views x) {
  check(state_->geometry, x);
  return state_->find_non_finite(x);
}

std::optional<std::size_t> WeightsCodec::begin(Views x) {
  State& state = *state_;
  check(state.geometry, x);
  if (const auto bad = state.find_non_finite(x)) {
    return bad;
  }
  state.for_each_run([&](std::size_t run, RunResult&) {
    const TileRun& tiles = state.geometry.runs()[run];
    for (const Tile& tile : state.geometry.tiles().subspan(tiles.first_tile, tiles.tiles)) {
      adopt_tile(state.kernels, state.geometry.segments(tile), x, state.w.data() + tile.begin);
      std::fill_n(state.r.data() + tile.begin, tile.elements, 0.0F);
    }
  });
  rehash();
  return std::nullopt;
}

Step WeightsCodec::advance(Views x, const Due* due, float share_before, float share_after) {
  check(state_->geometry, x);
  if (due != nullptr) {
    check(state_->geometry, *due);
  }
  return state_->step({x, &share_before, due, true, &share_after});
}

Step WeightsCodec::follow(Views x, const Due* due, float share_before, float share_after) {
  check(state_->geometry, x);
  if (due != nullptr) {
    check(state_->geometry, *due);
  }
  return state_->step({x, &share_before, due, false, &share_after});
}

Step WeightsCodec::encode(Views x, float share_before) {
  check(state_->geometry, x);
  return state_->step({x, &share_before, nullptr, true, nullptr});
}

void WeightsCodec::settle(Views x, const Due& due, float share_after) {
  check(state_->geometry, x);
  check(state_->geometry, due);
  state_->run({x, nullptr, &due, false, &share_after});
}

void WeightsCodec::apply(const Due& due) {
  check(state_->geometry, due);
  state_->run({{}, nullptr, &due, false, nullptr});
}

void WeightsCodec::leave(Views x, float share) {
  check(state_->geometry, x);
  state_->run({x, nullptr, nullptr, false, &share});
}

std::vector<std::byte> WeightsCodec::empty_record() const {
  return in_arena(state_->arena, [&] { return state_->coder.empty(); });
}

ParsedRecord WeightsCodec::parse(std::span<const std::byte> body) const {
  return in_arena(state_->arena, [&] { return state_->coder.parse(body); });
}

std::uint64_t WeightsCodec::checksum() const noexcept { return state_->checksum; }

std::span<const float> WeightsCodec::reference(std::size_t tensor) const noexcept {
  return std::span(state_->w).subspan(state_->geometry.offset(tensor),
                                      state_->geometry.tensor_elements(tensor));
}

std::span<const float> WeightsCodec::residual(std::size_t tensor) const noexcept {
  return std::span(state_->r).subspan(state_->geometry.offset(tensor),
                                      state_->geometry.tensor_elements(tensor));
}

std::vector<TensorState> WeightsCodec::state(Views x, float share) {
  State& state = *state_;
  check(state.geometry, x);
  std::vector<TensorState> result;
  for (std::size_t tensor = 0; tensor < state.geometry.tensors(); ++tensor) {
    const auto w = reference(tensor);
    const auto r = residual(tensor);
    result.push_back({{w.begin(), w.end()}, {r.begin(), r.end()}});
  }
  state.for_each_run([&](std::size_t run, RunResult&) {
    const TileRun& tiles = state.geometry.runs()[run];
    for (const Tile& tile : state.geometry.tiles().subspan(tiles.first_tile, tiles.tiles)) {
      for (const Segment& segment : state.geometry.segments(tile)) {
        TensorState& copy = result[segment.tensor];
        absorb_segment(state.kernels, segment, x, copy.reference.data() + segment.tensor_begin,
                       copy.residual.data() + segment.tensor_begin, share);
      }
    }
  });
  return result;
}

std::uint64_t WeightsCodec::fingerprint(Views x, std::uint64_t number) {
  check(state_->geometry, x);
  return plugins::fingerprint(part_of(x, number));
}

void WeightsCodec::restore_state(std::size_t tensor, std::span<const float> reference,
                                 std::span<const float> residual) {
  State& state = *state_;
  check_state(state.geometry, state.kernels, tensor, reference, residual);
  const auto at = static_cast<std::ptrdiff_t>(state.geometry.offset(tensor));
  std::copy(reference.begin(), reference.end(), state.w.begin() + at);
  std::copy(residual.begin(), residual.end(), state.r.begin() + at);
}

void WeightsCodec::rehash() {
  State& state = *state_;
  state.for_each_run([&](std::size_t run, RunResult& result) {
    const TileRun& tiles = state.geometry.runs()[run];
    for (const Tile& tile : state.geometry.tiles().subspan(tiles.first_tile, tiles.tiles)) {
      result.checksum +=
          state.kernels.checksum(state.w.data() + tile.begin, tile.elements, tile.begin);
    }
  });
  state.checksum = 0;
  for (const RunResult& result : state.results) {
    state.checksum += result.checksum;
  }
}

std::unique_ptr<ModuleCodec> make_host_codec(Geometry geometry, const WeightsConfig& config) {
  return std::make_unique<WeightsCodec>(std::move(geometry), config);
}

}  // namespace distro::plugins
