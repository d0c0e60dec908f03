#pragma once

#include <oneapi/tbb/task_arena.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kernels/kernels.h"
#include "plugins/geometry.h"
#include "plugins/record.h"
#include "plugins/tensor_view.h"

namespace distro::plugins {

/// How the codec of one module works; the same on all ranks but for isa and arena, which change no
/// bit.
struct WeightsConfig {
  std::uint32_t k = 6;           ///< Entries kept per 4096 weights.
  std::uint32_t value_bits = 1;  ///< 1: sign x shared scale; 32: exact fp32 values.
  kernels::Isa isa = kernels::Isa::scalar;
  tbb::task_arena* arena = nullptr;  ///< Where its tasks run; null: the caller's. Outlives it.
  /// Steps over which what a gain adds to the mean of the moves comes (spread()); 0: all at once.
  std::uint32_t spread_steps = 0;
  /// What R is kept in: 32 (fp32), or 16 (rounded to bf16 at each exchange; half the memory).
  /// Changes what this participant sends and its own x.
  std::uint32_t residual_bits = 32;
};

/// Entries kept of each 4096 weights that are looked at: all that are kept of `turns` times as
/// many.
[[nodiscard]] std::uint32_t kept_of_turn(std::uint32_t k, std::size_t turns) noexcept;

/// An exchange that is due: what every participant sent, in participant order. All records are of
/// one turn.
struct Due {
  std::span<const Contribution> contributions;
  std::size_t own = 0;  ///< Which contribution is this participant's.
  float gain = 1.0F;    ///< W += gain * sum of weight * q.

  [[nodiscard]] std::size_t turn() const noexcept { return contributions[own].record->turn; }
};

/// How the part of a gain above 1 is spread over the steps after an exchange. The mean of the moves
/// counts at once, (gain - 1) times it comes bit by bit: a low-pass, so that what the ranks still
/// correct a moment later is not amplified, while what they keep on doing is.
struct Spread {
  float gain = 0.0F;  ///< What is spread of an exchange: pending += gain * sum of weight * q.
  float keep = 0.0F;  ///< What stays pending of it each time that it is its weights' turn.
};

/// Of an exchange with this gain. Not exp(): its last bit differs between machines.
[[nodiscard]] Spread spread(float gain, std::uint32_t spread_steps, std::size_t turns) noexcept;

/// What one step saw and made.
struct Step {
  std::vector<std::byte> record;  ///< The record's body, ready for the wire.
  /// Mean |move| of a weight that was looked at, in a step; where R is derived from x, mean |R| of
  /// as many steps.
  double move_mean = 0.0;
  /// First tensor with a non-finite weight, where one that was looked at is not finite. Then the
  /// record is empty, and the codec cannot go on: each tile (of 4096 weights) that has one is as it
  /// was, others may have been exchanged already, so that every x is one or the other.
  std::optional<std::size_t> non_finite;
};

/// Step::move_mean, of the sum of |move| over the turn of exchange `number`: its weights have moved
/// since their last turn.
[[nodiscard]] double mean_move(const Geometry& geometry, std::uint64_t number, double sum) noexcept;

/// W, R and P of one tensor, in its element order.
struct TensorState {
  std::vector<float> reference;
  std::vector<float> residual;
  std::vector<float> pending;  ///< Empty where no gain was spread.
};

/// Whether absorbing a move changes what x has to be. With shares of 1 x is W + R before and after
/// but for rounding, and what rounding leaves is absorbed next time.
[[nodiscard]] constexpr bool restores(float share_before, float share_after) noexcept {
  return share_before != 1.0F || share_after != 1.0F;
}

/// Whether R need not be kept where x has been left with this share: x = W + R says what it is. Not
/// where x is rounded to 16 bits, for what rounding takes is no move.
[[nodiscard]] bool derives_residual(std::span<const TensorView> x, float share) noexcept;

/// What the engine needs of a `weights` mode codec, wherever the weights lie: the reference W and
/// the residual R of one module on one rank, and the records that change them. Implementations
/// write and read the same records, and hold the same bits of W, so that ranks of one group may
/// use different ones.
///
/// State, fp32, one value a weight: W, the same bits on every rank; R, what this participant moved
/// that is not in W yet, *entries in flight included* (they leave R when their exchange is
/// applied), so that x = W + share * R holds for every entry whenever a call has left it, whatever
/// the delay. Where gains are spread (Spread) there is P too, also the same on every rank: what W
/// is ahead. Then wherever x = W + share * R is said, x = (W - P) + share * R is meant. Where
/// derives_residual(), R is what x is ahead of W, and need not take memory.
///
/// Where the geometry has several turns, exchange `number` looks at the weights of its turn only,
/// and the others keep what the optimizer does to them in full until they are looked at.
///
/// Calls run on the caller's thread, with tasks in the config's arena. Not thread-safe but for
/// parse(): one call at a time. No call changes W but begin(), settle(), apply(), advance(),
/// follow() and restore_state(), and those only by what all ranks know, in participant order.
/// std::invalid_argument where tensors, records or a state do not fit the geometry.
class ModuleCodec {
 public:
  using Views = std::span<const TensorView>;

  ModuleCodec() = default;
  virtual ~ModuleCodec() = default;

  [[nodiscard]] virtual const Geometry& geometry() const noexcept = 0;

  /// The first tensor with a non-finite weight (kernels::kLargestWeight and more count as such).
  [[nodiscard]] virtual std::optional<std::size_t> first_non_finite(Views x) = 0;

  /// W = x rounded to fp32, R = 0. Returns the first tensor with a non-finite weight, if any (W is
  /// then as it was).
  virtual std::optional<std::size_t> begin(Views x) = 0;

  /// Delay 1, exchange `number`: absorb the optimizer's move (x was left at W + share_before * R),
  /// apply the exchange that is due (null: none), select and encode, leave x = W + share_after * R.
  /// Weights whose W has not changed stay as the optimizer left them unless restores().
  virtual Step advance(Views x, std::uint64_t number, const Due* due, float share_before,
                       float share_after) = 0;

  /// As advance(), but nothing is selected: another rank with the same x sends for this one. The
  /// step's record is empty.
  virtual Step follow(Views x, std::uint64_t number, const Due* due, float share_before,
                      float share_after) = 0;

  /// Delay 0, first half: absorb, select and encode. x is not written.
  virtual Step encode(Views x, std::uint64_t number, float share_before) = 0;

  /// Delay 0, second half: apply the exchange, leave x = W + share_after * R.
  virtual void settle(Views x, const Due& due, float share_after) = 0;

  /// Apply the exchange that is due to W and R, reading and writing no x (the script has
  /// overwritten it).
  virtual void apply(const Due& due) = 0;

  /// x = W + share * R. Where R is derived from x: with a share of 0 it is lost, unless the caller
  /// brings x back; with another one it is taken from x.
  virtual void leave(Views x, float share) = 0;

  /// Absorb the optimizer's move of all weights, whosever turn it is, and leave them with another
  /// share.
  virtual void reshare(Views x, float share_before, float share_after) = 0;

  /// The body of a record of exchange `number` that sends nothing.
  [[nodiscard]] virtual std::vector<std::byte> empty_record(std::uint64_t number) const = 0;

  /// Check and unpack the body of a record of exchange `number` that a peer sent (or the own one).
  /// Throws RecordError on any malformed byte.
  [[nodiscard]] virtual ParsedRecord parse(std::span<const std::byte> body,
                                           std::uint64_t number) const = 0;

  /// Checksum over all of W, kept up to date entry by entry.
  [[nodiscard]] virtual std::uint64_t checksum() const noexcept = 0;

  /// W and R by tensor, R with what the optimizer has moved since x was left at W + share * R.
  [[nodiscard]] virtual std::vector<TensorState> state(Views x, float share) = 0;

  /// Fingerprint of one part of x as it is (plugins/fingerprint.h): the same on ranks with the same
  /// bits, wherever they lie.
  [[nodiscard]] virtual std::uint64_t fingerprint(Views x, std::uint64_t number) = 0;

  /// Replace W, R and P of a tensor (a per-rank resume); call rehash() after the last one. Where
  /// nothing is pending, and where no gain is spread, P may be empty.
  virtual void restore_state(std::size_t tensor, std::span<const float> reference,
                             std::span<const float> residual, std::span<const float> pending) = 0;
  /// Compute the checksum anew.
  virtual void rehash() = 0;

 protected:
  ModuleCodec(const ModuleCodec&) = default;
  ModuleCodec(ModuleCodec&&) = default;
  ModuleCodec& operator=(const ModuleCodec&) = default;
  ModuleCodec& operator=(ModuleCodec&&) = default;
};

/// Checks of what a caller gives a codec of this geometry. They throw std::invalid_argument.
void check(const Geometry& geometry, std::span<const TensorView> x);
void check(const Geometry& geometry, const Due& due);
void check_state(const Geometry& geometry, const kernels::KernelTable& kernels, std::size_t tensor,
                 std::span<const float> reference, std::span<const float> residual,
                 std::span<const float> pending);

/// Makes the codec of a module whose tensors have this geometry.
using CodecFactory =
    std::function<std::unique_ptr<ModuleCodec>(Geometry geometry, const WeightsConfig& config)>;

}  // namespace distro::plugins
