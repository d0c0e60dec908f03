#include "plugins/weights.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <utility>

#include "kernels/aligned.h"
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
  bool finite = true;
};

// Weights that one task looks at for non-finite ones. Fewer: the tasks cost more than they do;
// more: threads wait for the last one.
constexpr std::size_t kBlockElements = 16 * kernels::kTileElements;

/// A value for each weight. The first tile begins with a cache line, and so do all where tensors
/// have whole lines of a turn: no vector lies across two lines there.
using Values = kernels::HugeVector<float>;
using TileBuffer = std::array<float, kernels::kTileElements>;

/// Consecutive weights of a tensor.
struct Block {
  std::size_t tensor = 0;
  std::size_t begin = 0;
  std::size_t elements = 0;
};

}  // namespace

std::uint32_t kept_of_turn(std::uint32_t k, std::size_t turns) noexcept {
  const std::size_t kept = k * turns;
  return static_cast<std::uint32_t>(std::min(kept, kernels::kTileElements));
}

std::size_t default_turns(std::uint32_t k) noexcept {
  constexpr std::size_t kMost = 16;
  constexpr std::size_t kMostKept = kernels::kTileElements / 16;
  std::size_t turns = 1;
  while (turns < kMost && 2 * turns * k <= kMostKept) {
    turns *= 2;
  }
  return turns;
}

std::uint32_t default_spread_steps(std::uint32_t k, int delay) noexcept {
  // Fewer: an entry is sent so seldom that the participants' parts come one by one as it is.
  constexpr std::uint32_t kLeastK = 24;
  constexpr std::uint32_t kMostSteps = 48;
  // With everything sent and waited for, every step begins where all ranks are.
  const bool seen_at_once = k == kernels::kTileElements && delay == 0;
  return k < kLeastK || seen_at_once ? 0 : std::min(3 * k / 8, kMostSteps);
}

float default_share(float sent, float gain, std::uint32_t k, std::uint32_t spread_steps) noexcept {
  constexpr float kLeastOfMany = 0.5F;
  constexpr std::uint32_t kFew = 64;
  if (gain > 1.0F) {
    return spread_steps > 0 ? 1.0F : sent;
  }
  return k > kFew ? std::max(sent, kLeastOfMany) : sent;
}

double mean_move(const Geometry& geometry, std::uint64_t number, double sum) noexcept {
  const auto elements =
      static_cast<double>(std::max<std::size_t>(geometry.elements(geometry.turn_of(number)), 1));
  const auto steps = static_cast<double>(std::clamp<std::uint64_t>(number, 1, geometry.turns()));
  return sum / elements / steps;
}

struct WeightsCodec::State {
  State(Geometry cut, WeightsConfig how)
      : geometry(std::move(cut)),
        kernels(kernels::table(how.isa)),
        arena(how.arena),
        spread_steps(how.spread_steps),
        w(geometry.elements()) {
    std::size_t most_runs = 0;
    std::size_t most_staged = 0;
    for (std::size_t turn = 0; turn < geometry.turns(); ++turn) {
      coders.emplace_back(geometry.layout(turn),
                          RecordFormat{kept_of_turn(how.k, geometry.turns()), how.value_bits});
      most_runs = std::max(most_runs, geometry.runs(turn).size());
      most_staged = std::max(most_staged, coders.back().staging_bytes());
    }
    for (std::size_t tensor = 0; tensor < geometry.tensors(); ++tensor) {
      const std::size_t n = geometry.tensor_elements(tensor);
      for (std::size_t begin = 0; begin < n; begin += kBlockElements) {
        blocks.push_back({tensor, begin, std::min(kBlockElements, n - begin)});
      }
    }
    staging.resize(most_staged);
    bits.resize(most_runs);
    results.resize(most_runs);
  }

  /// What one pass over the tiles of a turn does; null parts are left out.
  struct Pass {
    std::span<const TensorView> x;
    const float* absorb = nullptr;  ///< share before
    const Due* due = nullptr;
    bool select = false;
    const float* restore = nullptr;  ///< share after
    bool derive = false;  ///< R is computed as what x is ahead of W, and nothing is absorbed.
    bool ahead = false;   ///< x is W + R before the exchange.

    /// Whether x is W + R before as after, but for what the exchange changes.
    [[nodiscard]] bool restores_touched() const noexcept {
      return ahead && restore != nullptr && derives_residual(x, *restore);
    }
  };

  /// What a pass saw.
  struct Seen {
    double moved = 0.0;  ///< Sum of |move|.
    bool finite = true;
  };

  /// Of all weights, whosever turn it is.
  [[nodiscard]] std::optional<std::size_t> find_non_finite(std::span<const TensorView> x);
  /// Per tile: absorb, apply, select, restore; nothing of it where the tile is not finite. Adds up
  /// the checksum.
  Seen run(std::size_t turn, const Pass& pass);
  void run_tiles(std::size_t turn, const Pass& pass, bool restores_touched, std::size_t run);
  /// W - P of a tile: W itself where no gain is spread, or computed in the buffer.
  [[nodiscard]] const float* arrived(const Tile& tile, TileBuffer& buffer) const noexcept;
  [[nodiscard]] Step step(std::uint64_t number, Pass pass);
  /// Whether R is what x, left with this share, is ahead of W.
  [[nodiscard]] bool derives(std::span<const TensorView> x, float share) const noexcept {
    return r.empty() || derives_residual(x, share);
  }
  /// From now on R is kept, unless it need not be (ModuleCodec) with this share.
  void keep_residual(std::span<const TensorView> x, float share);
  /// From now on P is kept, if what this exchange adds is spread.
  void keep_pending(const Due& due);
  /// The weights of a turn have been left with this share: where these are all, drop_residual().
  void all_left(std::span<const TensorView> x, float share);
  /// R is not kept any more, where it need not be. All of x has been left with this share.
  void drop_residual(std::span<const TensorView> x, float share);
  /// Runs task(tile, number of the tile in its turn, result of its run) for every tile of a turn.
  template <class Task>
  void for_each_tile(std::size_t turn, const Task& task);
  template <class Task>
  void for_each_run(std::size_t turn, const Task& task);
  /// A copy of values in the flat order, in the order of the tensor's elements.
  [[nodiscard]] std::vector<float> of_tensor(std::size_t tensor, const Values& values) const;
  void to_tensor(std::size_t tensor, std::span<const float> from, Values& values) const;
  /// Calls visit(first element in the tensor, first in the flat order, elements).
  template <class Visit>
  void for_each_stretch_of(std::size_t tensor, const Visit& visit) const;

  Geometry geometry;
  const kernels::KernelTable& kernels;
  tbb::task_arena* arena;
  std::vector<RecordCoder> coders;  // by turn
  std::vector<Block> blocks;
  std::uint32_t spread_steps;
  Values w;
  Values r;                    // empty: what x is ahead of W
  Values pending;              // P; empty: no gain was spread so far
  bool encoded_ahead = false;  // Pass::ahead of the step before
  std::uint64_t checksum = 0;
  // Kept between steps, so that a step allocates nothing but the record that it returns.
  std::vector<std::byte> staging;
  std::vector<std::size_t> bits;
  std::vector<RunResult> results;
};

template <class Task>
void WeightsCodec::State::for_each_run(std::size_t turn, const Task& task) {
  in_arena(arena, [&] {
    parallel_for(geometry.runs(turn).size(), [&](std::size_t run) {
      const DefaultFloatEnvironment environment;
      results[run] = {};
      task(run, results[run]);
    });
  });
}

template <class Task>
void WeightsCodec::State::for_each_tile(std::size_t turn, const Task& task) {
  for_each_run(turn, [&](std::size_t run, RunResult& result) {
    const TileRun& tiles = geometry.runs(turn)[run];
    for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
      task(geometry.tiles(turn)[t], t, result);
    }
  });
}

std::optional<std::size_t> WeightsCodec::State::find_non_finite(std::span<const TensorView> x) {
  std::atomic<std::size_t> first{kNone};
  in_arena(arena, [&] {
    parallel_for(blocks.size(), [&](std::size_t i) {
      const DefaultFloatEnvironment environment;
      const Block& block = blocks[i];
      const TensorView& tensor = x[block.tensor];
      bool finite = true;
      for (std::size_t done = 0; finite && done < block.elements; done += kernels::kTileElements) {
        const std::size_t n = std::min(kernels::kTileElements, block.elements - done);
        finite = kernels.finite(tensor.dtype, address(tensor, block.begin + done), n);
      }
      if (!finite) {
        std::size_t before = first.load();
        while (block.tensor < before && !first.compare_exchange_weak(before, block.tensor)) {
        }
      }
    });
  });
  return first == kNone ? std::nullopt : std::optional(first.load());
}

void WeightsCodec::State::keep_residual(std::span<const TensorView> x, float share) {
  if (r.empty() && !derives_residual(x, share)) {
    r.resize(geometry.elements());
  }
}

void WeightsCodec::State::keep_pending(const Due& due) {
  if (spread(due.gain, spread_steps, geometry.turns()).gain > 0.0F) {
    pending.resize(geometry.elements());
  }
}

void WeightsCodec::State::all_left(std::span<const TensorView> x, float share) {
  if (geometry.turns() == 1) {
    drop_residual(x, share);
  }
}

void WeightsCodec::State::drop_residual(std::span<const TensorView> x, float share) {
  if (derives_residual(x, share)) {
    r = Values();  // which gives its memory back
  }
}

const float* WeightsCodec::State::arrived(const Tile& tile, TileBuffer& buffer) const noexcept {
  const float* const tile_w = w.data() + tile.begin;
  if (pending.empty()) {
    return tile_w;
  }
  const float* const tile_p = pending.data() + tile.begin;
  for (std::size_t j = 0; j < tile.elements; ++j) {
    buffer[j] = tile_w[j] - tile_p[j];
  }
  return buffer.data();
}

void WeightsCodec::State::run_tiles(std::size_t turn, const Pass& pass, bool restores_touched,
                                    std::size_t run) {
  const TileRun& tiles = geometry.runs(turn)[run];
  const RecordCoder& coder = coders[turn];
  RunResult& result = results[run];
  RunWriter writer = coder.writer(run, staging);
  kernels::SparseSum sum;
  std::array<std::uint16_t, kernels::kTileElements> index{};
  TileBuffer buffer;
  TileBuffer derived;
  if (r.empty() && !pass.derive) {
    derived.fill(0.0F);  // x is not known, or does not count
  }
  const std::size_t end = tiles.first_tile + tiles.tiles;
  for (std::size_t t = tiles.first_tile; t < end; ++t) {
    const Tile& tile = geometry.tiles(turn)[t];
    float* const tile_w = w.data() + tile.begin;
    float* const tile_r = r.empty() ? derived.data() : r.data() + tile.begin;
    const bool absorbs = pass.derive || pass.absorb != nullptr;
    if (absorbs) {
      const auto moved = absorb_tile(kernels, geometry, tile, pass.x, arrived(tile, buffer), tile_r,
                                     pass.derive ? nullptr : pass.absorb);
      if (!moved) {
        result.finite = false;
        continue;
      }
      result.moved += *moved;
    }
    if (pass.due != nullptr) {
      Pending tile_p;
      if (!pending.empty()) {
        tile_p = {std::span(pending).subspan(tile.begin, tile.elements),
                  spread(pass.due->gain, spread_steps, geometry.turns())};
      }
      // Where no pass over the tile precedes this one, every entry is a cache miss.
      const bool fetch_next = !absorbs && t + 1 < geometry.tiles(turn).size();
      result.checksum +=
          apply_tile(kernels, *pass.due, t, tile, tile_w, tile_r, tile_p, fetch_next, sum);
    }
    if (pass.select) {
      const std::size_t kept = TileLayout::kept(coder.format().k, tile.elements);
      const std::size_t count = kernels.select(tile_r, tile.elements, kept, index.data());
      writer.add(std::span(index).first(count), tile_r);
    }
    if (pass.restore == nullptr) {
      continue;
    }
    if (restores_touched) {
      restore_touched(geometry, tile, pass.x, tile_w, tile_r, sum.index());
    } else {
      restore_tile(kernels, geometry, tile, pass.x, arrived(tile, buffer), tile_r, *pass.restore);
    }
  }
  if (pass.select) {
    bits[run] = writer.finish();
  }
}

WeightsCodec::State::Seen WeightsCodec::State::run(std::size_t turn, const Pass& pass) {
  const bool restores_touched = pending.empty() && pass.restores_touched();
  for_each_run(turn,
               [&](std::size_t run, RunResult&) { run_tiles(turn, pass, restores_touched, run); });
  Seen seen;
  for (const RunResult& result : std::span(results).first(geometry.runs(turn).size())) {
    seen.moved += result.moved;
    seen.finite = seen.finite && result.finite;
    checksum += result.checksum;
  }
  return seen;
}

Step WeightsCodec::State::step(std::uint64_t number, Pass pass) {
  const std::size_t turn = geometry.turn_of(number);
  if (pass.due != nullptr) {
    keep_pending(*pass.due);
  }
  if (pass.restore != nullptr) {
    keep_residual(pass.x, *pass.restore);
  }
  pass.derive = derives(pass.x, *pass.absorb);
  pass.ahead = encoded_ahead = pass.derive;
  // The weights of the exchange that is due had the turn before.
  const bool two_turns = pass.due != nullptr && pass.due->turn() != turn;
  Step step;
  Pass of_turn = pass;
  if (two_turns) {
    Pass of_due = pass;
    of_due.select = false;
    if (!run(pass.due->turn(), of_due).finite) {
      step.non_finite = find_non_finite(pass.x);
      return step;
    }
    of_turn.due = nullptr;
  }
  if (of_turn.due == nullptr && pass.restore != nullptr && !restores(*pass.absorb, *pass.restore)) {
    of_turn.restore = nullptr;
  }
  const Seen seen = run(turn, of_turn);
  if (!seen.finite) {
    step.non_finite = find_non_finite(pass.x);
    return step;
  }
  step.move_mean = mean_move(geometry, number, seen.moved);
  if (pass.select) {
    step.record = in_arena(arena, [&] {
      return coders[turn].assemble(staging, std::span(bits).first(geometry.runs(turn).size()));
    });
  }
  if (pass.restore != nullptr) {
    all_left(pass.x, *pass.restore);
  }
  return step;
}

template <class Visit>
void WeightsCodec::State::for_each_stretch_of(std::size_t tensor, const Visit& visit) const {
  for (const Geometry::Place& place : geometry.places(tensor)) {
    const std::size_t flat = geometry.tiles()[place.tile].begin;
    geometry.for_each_stretch(
        geometry.segment(place),
        [&](std::size_t at, std::size_t j, std::size_t n) { visit(at, flat + j, n); });
  }
}

std::vector<float> WeightsCodec::State::of_tensor(std::size_t tensor, const Values& values) const {
  std::vector<float> copy(geometry.tensor_elements(tensor));
  for_each_stretch_of(tensor, [&](std::size_t at, std::size_t flat, std::size_t n) {
    std::copy_n(values.data() + flat, n, copy.data() + at);
  });
  return copy;
}

void WeightsCodec::State::to_tensor(std::size_t tensor, std::span<const float> from,
                                    Values& values) const {
  for_each_stretch_of(tensor, [&](std::size_t at, std::size_t flat, std::size_t n) {
    std::copy_n(from.data() + at, n, values.data() + flat);
  });
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
  for (std::size_t turn = 0; turn < state.geometry.turns(); ++turn) {
    state.for_each_tile(turn, [&](const Tile& tile, std::size_t, RunResult&) {
      adopt_tile(state.kernels, state.geometry, tile, x, state.w.data() + tile.begin);
    });
  }
  std::ranges::fill(state.r, 0.0F);
  state.pending = Values();  // on all ranks: who has P writes other weights than who has none
  rehash();
  return std::nullopt;
}

Step WeightsCodec::advance(Views x, std::uint64_t number, const Due* due, float share_before,
                           float share_after) {
  check(state_->geometry, x);
  if (due != nullptr) {
    check(state_->geometry, *due);
  }
  return state_->step(number, {x, &share_before, due, true, &share_after});
}

Step WeightsCodec::follow(Views x, std::uint64_t number, const Due* due, float share_before,
                          float share_after) {
  check(state_->geometry, x);
  if (due != nullptr) {
    check(state_->geometry, *due);
  }
  return state_->step(number, {x, &share_before, due, false, &share_after});
}

Step WeightsCodec::encode(Views x, std::uint64_t number, float share_before) {
  check(state_->geometry, x);
  return state_->step(number, {x, &share_before, nullptr, true, nullptr});
}

void WeightsCodec::settle(Views x, const Due& due, float share_after) {
  check(state_->geometry, x);
  check(state_->geometry, due);
  State& state = *state_;
  const bool derive = state.r.empty();
  state.keep_pending(due);
  state.keep_residual(x, share_after);
  const State::Pass pass{
      x, nullptr, &due, false, &share_after, derive, derive || state.encoded_ahead};
  if (!state.run(due.turn(), pass).finite) {
    throw std::logic_error("weights have changed between encode() and settle()");
  }
  state.all_left(x, share_after);
}

void WeightsCodec::apply(const Due& due) {
  check(state_->geometry, due);
  state_->keep_pending(due);
  state_->run(due.turn(), {{}, nullptr, &due, false, nullptr});
}

void WeightsCodec::leave(Views x, float share) {
  check(state_->geometry, x);
  constexpr float kAll = 1.0F;
  if (state_->r.empty() && share != 0.0F) {
    reshare(x, kAll, share);  // R is in x
    return;
  }
  for (std::size_t turn = 0; turn < state_->geometry.turns(); ++turn) {
    state_->run(turn, {x, nullptr, nullptr, false, &share});
  }
  state_->drop_residual(x, share);
}

void WeightsCodec::reshare(Views x, float share_before, float share_after) {
  check(state_->geometry, x);
  state_->keep_residual(x, share_after);
  const bool derive = state_->derives(x, share_before);
  for (std::size_t turn = 0; turn < state_->geometry.turns(); ++turn) {
    state_->run(turn, {x, &share_before, nullptr, false, &share_after, derive, derive});
  }
  state_->drop_residual(x, share_after);
}

std::vector<std::byte> WeightsCodec::empty_record(std::uint64_t number) const {
  const RecordCoder& coder = state_->coders[state_->geometry.turn_of(number)];
  return in_arena(state_->arena, [&] { return coder.empty(); });
}

ParsedRecord WeightsCodec::parse(std::span<const std::byte> body, std::uint64_t number) const {
  const std::size_t turn = state_->geometry.turn_of(number);
  ParsedRecord record = in_arena(state_->arena, [&] { return state_->coders[turn].parse(body); });
  record.turn = turn;
  return record;
}

std::uint64_t WeightsCodec::checksum() const noexcept { return state_->checksum; }

std::vector<float> WeightsCodec::reference(std::size_t tensor) const {
  return state_->of_tensor(tensor, state_->w);
}

std::vector<float> WeightsCodec::residual(std::size_t tensor) const {
  if (state_->r.empty()) {
    return std::vector<float>(state_->geometry.tensor_elements(tensor));
  }
  return state_->of_tensor(tensor, state_->r);
}

std::vector<TensorState> WeightsCodec::state(Views x, float share) {
  State& state = *state_;
  check(state.geometry, x);
  const bool derive = state.derives(x, share);
  Values r = state.r;
  r.resize(state.geometry.elements());
  for (std::size_t turn = 0; turn < state.geometry.turns(); ++turn) {
    state.for_each_tile(turn, [&](const Tile& tile, std::size_t, RunResult&) {
      TileBuffer buffer;
      float* const tile_r = r.data() + tile.begin;
      if (!absorb_tile(state.kernels, state.geometry, tile, x, state.arrived(tile, buffer), tile_r,
                       derive ? nullptr : &share)) {
        std::fill_n(tile_r, tile.elements, std::numeric_limits<float>::quiet_NaN());
      }
    });
  }
  std::vector<TensorState> result;
  for (std::size_t tensor = 0; tensor < state.geometry.tensors(); ++tensor) {
    result.push_back(
        {reference(tensor), state.of_tensor(tensor, r),
         state.pending.empty() ? std::vector<float>{} : state.of_tensor(tensor, state.pending)});
  }
  return result;
}

std::uint64_t WeightsCodec::fingerprint(Views x, std::uint64_t number) {
  check(state_->geometry, x);
  return plugins::fingerprint(part_of(x, number));
}

void WeightsCodec::restore_state(std::size_t tensor, std::span<const float> reference,
                                 std::span<const float> residual, std::span<const float> pending) {
  State& state = *state_;
  check_state(state.geometry, state.kernels, tensor, reference, residual, pending);
  state.to_tensor(tensor, reference, state.w);
  state.r.resize(state.geometry.elements());
  state.to_tensor(tensor, residual, state.r);
  if (!pending.empty() && state.spread_steps > 0) {
    state.pending.resize(state.geometry.elements());
    state.to_tensor(tensor, pending, state.pending);
  } else if (!state.pending.empty()) {
    state.to_tensor(tensor, std::vector<float>(reference.size()), state.pending);
  }
}

void WeightsCodec::rehash() {
  State& state = *state_;
  state.checksum = 0;
  for (std::size_t turn = 0; turn < state.geometry.turns(); ++turn) {
    state.for_each_tile(turn, [&](const Tile& tile, std::size_t, RunResult& result) {
      result.checksum +=
          state.kernels.checksum(state.w.data() + tile.begin, tile.elements, tile.begin);
    });
    for (std::size_t run = 0; run < state.geometry.runs(turn).size(); ++run) {
      state.checksum += state.results[run].checksum;
    }
  }
}

std::unique_ptr<ModuleCodec> make_host_codec(Geometry geometry, const WeightsConfig& config) {
  return std::make_unique<WeightsCodec>(std::move(geometry), config);
}

}  // namespace distro::plugins
