#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <vector>

#include "backend/c10d/device_layout.h"
#include "backend/c10d/device_residual.h"
#include "backend/c10d/device_selection.h"
#include "plugins/float_environment.h"
#include "plugins/module_codec.h"
#include "plugins/parallel.h"
#include "plugins/record_coder.h"

/// Inside of DeviceCodec.
namespace distro::c10d_backend {

/// The memory of a `weights` codec on a device, and what passes over it. Callers hold a
/// LastingArithmetic.
struct DeviceState {
  using Views = plugins::ModuleCodec::Views;

  /// What an exchange touches in one run of tiles: slots from the turn's first on, ascending.
  struct Touched {
    std::vector<std::int64_t> slot;
    std::vector<float> sum;
    std::uint64_t checksum = 0;  ///< Change.
  };

  /// A turn's part of the memory.
  struct Turn {
    DeviceLayout layout;
    plugins::RecordCoder coder;
  };

  /// A turn's weights in the script's tensors.
  using Chunks = std::vector<DeviceLayout::Chunk>;

  DeviceState(plugins::Geometry cut, const plugins::WeightsConfig& how, at::Device where);
  DeviceState(const DeviceState&) = delete;  // coders point into the geometry
  DeviceState& operator=(const DeviceState&) = delete;

  [[nodiscard]] Chunks chunks(std::size_t turn, Views x) const;
  /// Whether all of these weights are finite. The host waits for the device.
  [[nodiscard]] static bool finite(std::initializer_list<const Chunks*> looked_at);
  /// W - P: what x has of W.
  [[nodiscard]] at::Tensor arrived(const DeviceLayout::Chunk& chunk) const;
  /// What [slots of all turns] has of one.
  [[nodiscard]] at::Tensor of_turn(const at::Tensor& slots, std::size_t turn) const;
  /// R of a turn, to read and to change until it is closed; `derive`: zeros, to which absorb() adds
  /// all that x is ahead of W.
  [[nodiscard]] at::Tensor open(std::size_t turn, bool derive);
  void close(std::size_t turn, const at::Tensor& residual);
  /// The turn's residual += what the optimizer did to these weights, of which x was left with this
  /// share. Returns the sum of |move|, a scalar on the device.
  [[nodiscard]] at::Tensor absorb(std::size_t turn, const Chunks& chunks, float share,
                                  const at::Tensor& residual) const;
  /// Whether x is W + R before as after, but for what the exchange changes.
  [[nodiscard]] bool touches_only(Views x, float share_after, bool ahead) const noexcept;
  /// x = W + share * R; `touched`: only there, [entries] slots from the turn's first on (undefined:
  /// nowhere).
  void restore(std::size_t turn, const Chunks& chunks, const at::Tensor& residual, float share,
               const at::Tensor* touched) const;
  /// Whether R is what x, left with this share, is ahead of W.
  [[nodiscard]] bool derives(Views x, float share) const noexcept;
  /// The following say when R and P are kept, as those of plugins::WeightsState: bits depend on it.
  void keep_residual(Views x, float share);
  void keep_pending(const plugins::Due& due);
  void all_left(Views x, float share);
  void drop_residual(Views x, float share);
  /// Apply an exchange to W and P of its turn; its keep_pending() has been called. Returns what
  /// changed, as restore() takes it.
  [[nodiscard]] at::Tensor move_reference(const plugins::Due& due);
  /// residual -= what this participant sent.
  void take_from(const at::Tensor& residual, const plugins::ParsedRecord& own) const;
  /// Both of them.
  [[nodiscard]] at::Tensor exchange(const plugins::Due& due, const at::Tensor& residual);
  /// The body of a turn's record, of the keys of its entries in host memory.
  [[nodiscard]] std::vector<std::byte> write(std::size_t turn, const at::Tensor& keys);
  /// Runs task(number of the run, its tiles) for every run of a turn.
  template <class Task>
  void for_each_run(std::size_t turn, const Task& task) const;

  const plugins::Geometry geometry;
  const plugins::WeightsConfig config;
  const std::uint32_t kept;  // of 4096 weights that are looked at
  const at::Device device;
  std::vector<Turn> turns;
  DeviceSelection selection;
  DeviceResidual r;            // not kept: what x is ahead of W
  at::Tensor w;                // [slots] fp32
  at::Tensor pending;          // P, [slots] fp32; undefined: no gain was spread so far
  bool encoded_ahead = false;  // x was W + R at the step before
  std::uint64_t checksum = 0;
  std::vector<std::byte> staging;
  std::vector<std::size_t> bits;
  std::vector<Touched> touched_by_run;
};

template <class Task>
void DeviceState::for_each_run(std::size_t turn, const Task& task) const {
  plugins::in_arena(config.arena, [&] {
    plugins::parallel_for(geometry.runs(turn).size(), [&](std::size_t run) {
      const plugins::DefaultFloatEnvironment environment;
      task(run, geometry.runs(turn)[run]);
    });
  });
}

}  // namespace distro::c10d_backend
