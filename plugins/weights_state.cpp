#include "plugins/weights_state.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <utility>

#include "plugins/weights_tile.h"

namespace distro::plugins {
namespace {

constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();

// Weights that one task looks at for non-finite ones. Fewer: the tasks cost more than they do;
// more: threads wait for the last one.
constexpr std::size_t kBlockElements = 16 * kernels::kTileElements;

}  // namespace

WeightsState::WeightsState(Geometry cut, WeightsConfig how)
    : geometry(std::move(cut)),
      kernels(kernels::table(how.isa)),
      arena(how.arena),
      spread_steps(how.spread_steps),
      w(geometry.elements()),
      r(how.residual_bits) {
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

std::optional<std::size_t> WeightsState::find_non_finite(std::span<const TensorView> x) {
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

void WeightsState::keep_residual(std::span<const TensorView> x, float share) {
  if (!derives_residual(x, share)) {
    r.keep(geometry.elements());
  }
}

void WeightsState::keep_pending(const Due& due) {
  if (spread(due.gain, spread_steps, geometry.turns()).gain > 0.0F) {
    pending.resize(geometry.elements());
  }
}

void WeightsState::all_left(std::span<const TensorView> x, float share) {
  if (geometry.turns() == 1) {
    drop_residual(x, share);
  }
}

void WeightsState::drop_residual(std::span<const TensorView> x, float share) {
  if (derives_residual(x, share)) {
    r.drop();
  }
}

const float* WeightsState::arrived(const Tile& tile, TileBuffer& buffer) const noexcept {
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

void WeightsState::run_tiles(std::size_t turn, const Pass& pass, bool restores_touched,
                             std::size_t run) {
  const TileRun& tiles = geometry.runs(turn)[run];
  const RecordCoder& coder = coders[turn];
  RunResult& result = results[run];
  RunWriter writer = coder.writer(run, staging);
  kernels::SparseSum sum;
  std::array<std::uint16_t, kernels::kTileElements> index{};
  TileBuffer buffer;
  TileBuffer derived;
  if (!r.kept() && !pass.derive) {
    derived.fill(0.0F);  // x is not known, or does not count
  }
  const std::size_t end = tiles.first_tile + tiles.tiles;
  for (std::size_t t = tiles.first_tile; t < end; ++t) {
    const Tile& tile = geometry.tiles(turn)[t];
    float* const tile_w = w.data() + tile.begin;
    float* const tile_r = r.kept()
                              ? r.open(kernels, tile.begin, tile.elements, !pass.derive, derived)
                              : derived.data();
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
      // Where no pass over the tile precedes this one, every entry is a cache miss. Past the end of
      // the run too: what comes next is as a rule this thread's.
      const bool fetches = !absorbs && t + 1 < geometry.tiles(turn).size();
      const Next next{fetches ? tile_w + tile.elements : nullptr,
                      fetches && r.kept() && !r.rounds() ? tile_r + tile.elements : nullptr};
      result.checksum +=
          apply_tile(kernels, *pass.due, t, tile.begin, tile_w, tile_r, tile_p, next, sum);
    }
    if (pass.select) {
      const std::size_t kept = TileLayout::kept(coder.format().k, tile.elements);
      const std::size_t count = kernels.select(tile_r, tile.elements, kept, index.data());
      writer.add(std::span(index).first(count), tile_r);
    }
    if (r.kept()) {
      r.close(kernels, tile_r, tile.begin, tile.elements);
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

WeightsState::Seen WeightsState::run(std::size_t turn, const Pass& pass) {
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

Step WeightsState::step(std::uint64_t number, Pass pass) {
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
  // Rounding R may take x over to the next number of its type.
  const bool rounds = r.kept() && r.rounds();
  if (of_turn.due == nullptr && pass.restore != nullptr && !rounds &&
      !restores(*pass.absorb, *pass.restore)) {
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
void WeightsState::for_each_stretch_of(std::size_t tensor, const Visit& visit) const {
  for (const Geometry::Place& place : geometry.places(tensor)) {
    const std::size_t flat = geometry.tiles()[place.tile].begin;
    geometry.for_each_stretch(
        geometry.segment(place),
        [&](std::size_t at, std::size_t j, std::size_t n) { visit(at, flat + j, n); });
  }
}

std::vector<float> WeightsState::of_tensor(std::size_t tensor, const Values& values) const {
  std::vector<float> copy(geometry.tensor_elements(tensor));
  for_each_stretch_of(tensor, [&](std::size_t at, std::size_t flat, std::size_t n) {
    std::copy_n(values.data() + flat, n, copy.data() + at);
  });
  return copy;
}

std::vector<float> WeightsState::residual_of_tensor(std::size_t tensor) const {
  std::vector<float> copy(geometry.tensor_elements(tensor));
  if (r.kept()) {
    for_each_stretch_of(tensor, [&](std::size_t at, std::size_t flat, std::size_t n) {
      r.read(flat, std::span(copy).subspan(at, n));
    });
  }
  return copy;
}

void WeightsState::residual_to_tensor(std::size_t tensor, std::span<const float> from) {
  for_each_stretch_of(tensor, [&](std::size_t at, std::size_t flat, std::size_t n) {
    r.write(flat, from.subspan(at, n));
  });
}

void WeightsState::to_tensor(std::size_t tensor, std::span<const float> from,
                             Values& values) const {
  for_each_stretch_of(tensor, [&](std::size_t at, std::size_t flat, std::size_t n) {
    std::copy_n(from.data() + at, n, values.data() + flat);
  });
}

}  // namespace distro::plugins
