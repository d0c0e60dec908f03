#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "backend/c10d/device_layout.h"
#include "plugins/module_codec.h"
#include "plugins/record_coder.h"

namespace distro::c10d_backend {

/// The `weights` mode codec of a module whose parameters lie on one device: W and R lie there, and
/// every dense operation runs there, by ATen, on the caller's current stream. To the host go the
/// selected entries only, and W at the entries that an exchange touches.
///
/// Writes the same records as plugins::WeightsCodec, and holds the same bits of W: what changes W
/// is computed on the host by the same functions, in participant order, and the device only stores
/// it. The dense operations are single multiplications, additions and roundings, each in a kernel
/// of its own, so that no compiler can contract them (ADR 0013).
///
/// Device-independent: on the CPU device it is an (unhurried) host codec, which is how it is
/// tested.
class DeviceCodec final : public plugins::ModuleCodec {
 public:
  DeviceCodec(plugins::Geometry geometry, const plugins::WeightsConfig& config, at::Device device);

  [[nodiscard]] const plugins::Geometry& geometry() const noexcept override { return geometry_; }
  [[nodiscard]] std::optional<std::size_t> first_non_finite(Views x) override;
  std::optional<std::size_t> begin(Views x) override;
  plugins::Step advance(Views x, std::uint64_t number, const plugins::Due* due, float share_before,
                        float share_after) override;
  plugins::Step follow(Views x, std::uint64_t number, const plugins::Due* due, float share_before,
                       float share_after) override;
  plugins::Step encode(Views x, std::uint64_t number, float share_before) override;
  void settle(Views x, const plugins::Due& due, float share_after) override;
  void apply(const plugins::Due& due) override;
  void leave(Views x, float share) override;
  void reshare(Views x, float share_before, float share_after) override;
  [[nodiscard]] std::vector<std::byte> empty_record(std::uint64_t number) const override;
  [[nodiscard]] plugins::ParsedRecord parse(std::span<const std::byte> body,
                                            std::uint64_t number) const override;
  [[nodiscard]] std::uint64_t checksum() const noexcept override { return checksum_; }
  [[nodiscard]] std::vector<plugins::TensorState> state(Views x, float share) override;
  [[nodiscard]] std::uint64_t fingerprint(Views x, std::uint64_t number) override;
  void restore_state(std::size_t tensor, std::span<const float> reference,
                     std::span<const float> residual, std::span<const float> pending) override;
  void rehash() override;

 private:
  /// What an exchange touches in one run of tiles, ascending.
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

  [[nodiscard]] Chunks chunks(std::size_t turn, Views x) const;
  /// Whether all of these weights are finite. The host waits for the device.
  [[nodiscard]] bool finite(std::initializer_list<const Chunks*> looked_at) const;
  /// W - P: what x has of W.
  [[nodiscard]] at::Tensor arrived(const DeviceLayout::Chunk& chunk) const;
  /// residual += what the optimizer did to these weights. Returns the sum of |move|, a scalar on
  /// the device. `derive`: the residual is zero before (plugins::derives_residual()).
  [[nodiscard]] at::Tensor absorb(const Chunks& chunks, float share, bool derive,
                                  const at::Tensor& residual) const;
  /// Whether x is W + R before as after, but for what the exchange changes.
  [[nodiscard]] bool touches_only(Views x, float share_after, bool ahead) const noexcept;
  void restore(const Chunks& chunks, float share, bool touched_only) const;
  /// WeightsCodec keeps no R and P where it need not; here R has its memory all the same, but the
  /// same bits.
  void keep_residual(Views x, float share) noexcept;
  void keep_pending(const plugins::Due& due);
  void all_left(Views x, float share) noexcept;
  void drop_residual(Views x, float share) noexcept;
  void move_reference(const plugins::Due& due);
  void take_from_residual(const plugins::ParsedRecord& own);
  void exchange(const plugins::Due& due);
  /// The largest entries of R by tile, as keys [tiles, k] on the device (see the source).
  [[nodiscard]] at::Tensor select(std::size_t turn) const;
  [[nodiscard]] std::vector<std::byte> write(std::size_t turn, const at::Tensor& keys);
  /// One exchange; null: nothing is due, x is not written. With a due exchange x is written.
  plugins::Step step(Views x, std::uint64_t number, const plugins::Due* due, float share_before,
                     const float* share_after, bool selects);
  template <class Task>
  void for_each_run(std::size_t turn, const Task& task) const;

  const plugins::Geometry geometry_;
  const plugins::WeightsConfig config_;
  const std::uint32_t kept_;  // of 4096 weights that are looked at
  const at::Device device_;
  std::vector<Turn> turns_;
  at::Tensor w_;        // [slots] fp32
  at::Tensor r_;        // [slots] fp32
  at::Tensor pending_;  // P, [slots] fp32; undefined: no gain was spread so far
  at::Tensor
      touched_slots_;  // [entries] int64: where the last exchange changed W; undefined: nowhere
  bool encoded_ahead_ = false;  // x was W + R at the step before
  bool derives_ = true;         // R is what x is ahead of W
  at::Tensor lane_;             // [4096] int64: a key's part that says which entry of the tile
  std::uint64_t checksum_ = 0;
  std::vector<std::byte> staging_;
  std::vector<std::size_t> bits_;
  std::vector<Touched> touched_;  // by run
};

/// The factory of codecs on a device.
[[nodiscard]] plugins::CodecFactory device_codecs(at::Device device);

}  // namespace distro::c10d_backend
