#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "plugins/geometry.h"
#include "plugins/record.h"
#include "plugins/tensor_view.h"

namespace distro::plugins {

/// How the codec of one module works; the same on all ranks but for isa and threads, which change
/// no bit.
struct WeightsConfig {
  std::uint32_t k = 6;           ///< Entries kept per 4096.
  std::uint32_t value_bits = 1;  ///< 1: sign x shared scale; 32: exact fp32 values.
  kernels::Isa isa = kernels::Isa::scalar;
};

/// An exchange that is due: what every participant sent, in participant order.
struct Due {
  std::span<const Contribution> contributions;
  std::size_t own = 0;  ///< Which contribution is this participant's.
  float gain = 1.0F;    ///< W += gain * sum of weight * q.
};

/// What one step saw and made.
struct Step {
  std::vector<std::byte> record;  ///< The record's body, ready for the wire.
  double move_mean = 0.0;         ///< Mean |move| over all weights.
  /// First tensor with a non-finite weight. Then the record is empty and W, R and x are as they
  /// were.
  std::optional<std::size_t> non_finite;
};

/// W and R of one tensor, in its element order.
struct TensorState {
  std::vector<float> reference;
  std::vector<float> residual;
};

/// The `weights` mode codec of one module on one rank: reference W, residual R, top k of R by tile
/// (README.md, "How it works").
///
/// State, fp32, one value a weight: W, the same bits on every rank; R, what this participant moved
/// that is not in W yet, *entries in flight included* (they leave R when their exchange is
/// applied), so that between calls x = W + share * R holds for every entry whatever the delay.
///
/// Work runs as oneTBB tasks over runs of tiles inside the caller's arena (tbb::this_task_arena).
/// Not thread-safe: one call at a time. No call changes W but begin(), settle() and advance(), and
/// those only by what all ranks know, in participant order.
class WeightsCodec {
 public:
  WeightsCodec(Geometry geometry, WeightsConfig config);
  ~WeightsCodec();
  WeightsCodec(WeightsCodec&&) noexcept;
  WeightsCodec& operator=(WeightsCodec&&) noexcept;

  [[nodiscard]] const Geometry& geometry() const noexcept;

  /// The first tensor with a non-finite weight (kernels::kLargestWeight and more count as such).
  [[nodiscard]] std::optional<std::size_t> first_non_finite(std::span<const TensorView> x);

  /// W = x rounded to fp32, R = 0. Returns the first tensor with a non-finite weight, if any (W is
  /// then unusable).
  std::optional<std::size_t> begin(std::span<const TensorView> x);

  /// Delay 1, one pass: absorb the optimizer's move (x was left at W + share_before * R), apply the
  /// exchange that is due (null: none), select and encode, leave x = W + share_after * R.
  Step advance(std::span<const TensorView> x, const Due* due, float share_before,
               float share_after);

  /// Delay 0, first half: absorb, select and encode. x is not written.
  Step encode(std::span<const TensorView> x, float share_before);

  /// Delay 0, second half: apply the exchange, leave x = W + share_after * R.
  void settle(std::span<const TensorView> x, const Due& due, float share_after);

  /// Apply the exchange that is due to W and R, reading and writing no x (the script has
  /// overwritten it).
  void apply(const Due& due);

  /// x = W + share * R.
  void leave(std::span<const TensorView> x, float share);

  /// The body of a record that sends nothing.
  [[nodiscard]] std::vector<std::byte> empty_record() const;

  /// Check and unpack a record body that a peer sent (or the own one). Throws RecordError on any
  /// malformed byte.
  [[nodiscard]] ParsedRecord parse(std::span<const std::byte> body) const;

  /// Checksum over all of W, kept up to date entry by entry.
  [[nodiscard]] std::uint64_t checksum() const noexcept;

  /// W and R of tensor i, in the tensor's element order.
  [[nodiscard]] std::span<const float> reference(std::size_t tensor) const noexcept;
  [[nodiscard]] std::span<const float> residual(std::size_t tensor) const noexcept;

  /// W and R by tensor, R with what the optimizer has moved since x was left at W + share * R.
  [[nodiscard]] std::vector<TensorState> state(std::span<const TensorView> x, float share);

  /// Replace the state of tensor i (a per-rank resume). Sizes must match; call rehash() after the
  /// last one.
  void restore_state(std::size_t tensor, std::span<const float> reference,
                     std::span<const float> residual);
  void rehash();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace distro::plugins
