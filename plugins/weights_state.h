#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/aligned.h"
#include "plugins/float_environment.h"
#include "plugins/geometry.h"
#include "plugins/module_codec.h"
#include "plugins/parallel.h"
#include "plugins/record_coder.h"
#include "plugins/residual_store.h"

/// Inside of WeightsCodec.
namespace distro::plugins {

/// The memory of a `weights` codec in host memory, and its passes over tiles.
struct WeightsState {
  /// What a task leaves for the caller to add up in run order.
  struct RunResult {
    double moved = 0.0;
    std::uint64_t checksum = 0;  ///< Change, or for a dense pass the sum.
    bool finite = true;
  };

  /// A value for each weight. The first tile begins with a cache line, and so do all where tensors
  /// have whole lines of a turn: no vector lies across two lines there.
  using Values = kernels::HugeVector<float>;

  /// Consecutive weights of a tensor.
  struct Block {
    std::size_t tensor = 0;
    std::size_t begin = 0;
    std::size_t elements = 0;
  };

  WeightsState(Geometry cut, WeightsConfig how);

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
    return !r.kept() || derives_residual(x, share);
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
  [[nodiscard]] std::vector<float> residual_of_tensor(std::size_t tensor) const;
  void residual_to_tensor(std::size_t tensor, std::span<const float> from);
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
  ResidualStore r;             // not kept: what x is ahead of W
  Values pending;              // P; empty: no gain was spread so far
  bool encoded_ahead = false;  // Pass::ahead of the step before
  std::uint64_t checksum = 0;
  // Kept between steps, so that a step allocates nothing but the record that it returns.
  std::vector<std::byte> staging;
  std::vector<std::size_t> bits;
  std::vector<RunResult> results;
};

template <class Task>
void WeightsState::for_each_run(std::size_t turn, const Task& task) {
  in_arena(arena, [&] {
    parallel_for(geometry.runs(turn).size(), [&](std::size_t run) {
      const DefaultFloatEnvironment environment;
      results[run] = {};
      task(run, results[run]);
    });
  });
}

template <class Task>
void WeightsState::for_each_tile(std::size_t turn, const Task& task) {
  for_each_run(turn, [&](std::size_t run, RunResult& result) {
    const TileRun& tiles = geometry.runs(turn)[run];
    for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
      task(geometry.tiles(turn)[t], t, result);
    }
  });
}

}  // namespace distro::plugins
