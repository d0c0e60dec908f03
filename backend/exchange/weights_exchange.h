#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/exchange/correspondence.h"
#include "backend/exchange/exact.h"
#include "backend/exchange/group.h"
#include "plugins/weights.h"

namespace distro::exchange {

/// What a rank must keep to go on with its own unsent moves after a restart. By tensor, in the
/// tensors' order.
struct ModuleState {
  std::vector<std::vector<float>> reference;  ///< W.
  std::vector<std::vector<float>>
      residual;  ///< R, an exchange in flight included: after a restart it is sent again.
  std::vector<std::vector<float>> pending;  ///< P; each empty where no gain was spread.
  std::uint64_t exchanges = 0;              ///< Exchanges sent so far.
  float share = 0.0F;                       ///< x is to be W + share * R.
  std::uint64_t mean_at = 0;  ///< Exchanges when all took the mean last: turns count from there.
};

/// `weights` mode of one module on one rank: what happens at its sync points (the DisTrO report's
/// compressed exchange at every step, of weights instead of gradients; README.md, "How it works").
/// Ranks of a site (sites.h) hold the same x, W and R, bit for bit: one of them, the leader,
/// selects and sends, and all apply the same records.
///
/// All functions but mark(), state() and load() are collective: every rank of the group calls the
/// same ones in the same order, with the same tensors in the same order. They throw ExchangeError
/// or transport::PeerError, after which the module cannot go on; before they throw for a reason
/// that others cannot see, they tell the others (Group::abort). Thread-safe.
class WeightsExchange {
 public:
  using Views = std::span<const plugins::TensorView>;

  /// Takes the group's next module ordinal. No tensors: the module is only introduced
  /// (stay_exact). `make_codec`: where W and R lie and x does; views of x are then of that memory.
  /// Throws OptionError, naming the option, where a record could be larger than the ranks can keep
  /// for each other.
  WeightsExchange(std::shared_ptr<Group> group, std::vector<TensorSpec> tensors,
                  const plugins::CodecFactory& make_codec = plugins::make_host_codec);
  ~WeightsExchange();
  WeightsExchange(const WeightsExchange&) = delete;
  WeightsExchange& operator=(const WeightsExchange&) = delete;

  /// Before the first training forward: check that all ranks have the same module, W = x. Ranks
  /// whose weights differ from rank 0's get rank 0's, with a warning.
  void begin(Views x, ExactCollectives& exact);

  /// A sync point, after the optimizer moved x. `gain`: what the mean of the moves is multiplied
  /// by.
  void sync(Views x, ExactCollectives& exact, float gain);

  /// Instead of begin(), or of a sync(): this rank does not exchange the module (any more), because
  /// of `reason`. All ranks must say so at the same place, or all get an error that names who does
  /// what and why. If the module has begun, x = the exact mean. Nothing but the destructor may
  /// follow.
  void stay_exact(Views x, ExactCollectives& exact, const std::string& reason);

  /// The script has overwritten weights (load_state_dict): at the next sync point x is left alone,
  /// and all ranks take the exact mean when that exchange is due.
  void mark();

  /// x = the exact mean of all ranks' x, in place; W = x, R = 0; an exchange in flight is dropped.
  /// Ranks may be one exchange apart (one has run a training forward alone); they go on together.
  void average(Views x, ExactCollectives& exact);

  /// Whether begin() has been called.
  [[nodiscard]] bool begun() const;

  /// Checksum of W as it is now.
  [[nodiscard]] std::uint64_t checksum() const;

  /// Exchanges sent so far.
  [[nodiscard]] std::uint64_t exchanges() const;

  /// A copy of the state, for a checkpoint of this rank: R takes in what the optimizer has moved
  /// since the last sync point.
  [[nodiscard]] ModuleState state(Views x);

  /// Once begun: x = W, what all ranks have in common. R is as it was: whoever shows W brings x
  /// back before anything else.
  void show_reference(Views x);

  /// Take up a state of a checkpoint before the first training forward, and leave x = W + share *
  /// R; every rank loads its own, saved at the same step (the references and exchange numbers are
  /// compared in begin()). Throws ExchangeError when the sizes do not fit or the module has begun.
  void load(const ModuleState& state, Views x);

  [[nodiscard]] std::uint32_t ordinal() const noexcept { return ranks_.module(); }
  [[nodiscard]] std::span<const TensorSpec> tensors() const noexcept { return ranks_.tensors(); }

 private:
  friend struct WeightsExchangeTestAccess;  // a test damages W as a memory fault would

  struct Exchange;  // what all ranks sent under one number

  template <typename Step>
  void guarded(Step&& step);
  void begin_locked(Views x, ExactCollectives& exact);
  void sync_locked(Views x, ExactCollectives& exact, float gain);
  void average_locked(Views x, ExactCollectives& exact);
  void stay_exact_locked(Views x, ExactCollectives& exact, const std::string& reason);
  plugins::Step encode(Views x, const Exchange* due);
  void settle(Views x, const Exchange& now, float share_before, float share_after);
  void send(const plugins::Step& step, std::uint64_t fingerprint, bool edited);
  [[nodiscard]] std::size_t own() const;
  Exchange collect();
  void take_mean(Views x, ExactCollectives& exact);
  void watch_move(double mean_move);
  float gain_of(const std::vector<Letter>& letters);
  void publish();
  [[nodiscard]] float share() const;
  /// The number of the exchange that was sent last, for the codec: whoever takes up the weights
  /// where the ranks have the same, begins with the same turn.
  [[nodiscard]] std::uint64_t since_mean() const noexcept { return sent_.exchange - mean_at_; }

  const std::shared_ptr<Group> group_;

  mutable std::mutex mutex_;  // guards everything below
  Correspondence ranks_;
  std::unique_ptr<plugins::ModuleCodec> codec_;
  std::exception_ptr failed_;  // the first error of a collective function
  bool begun_ = false;
  bool loaded_ = false;        // W and R come from a checkpoint
  bool marked_ = false;        // the script has overwritten the weights
  Statement sent_;             // of the last exchange that was sent
  std::uint64_t mean_at_ = 0;  // the exchange at which all took the mean last
  bool in_flight_ = false;     // it is not applied yet
  bool asked_ = false;         // it asks for a resync
  plugins::ParsedRecord own_;  // what this rank sent in it, if it sends for its participant
  float share_left_ = 0.0F;    // share with which x was left
  bool moved_ = false;         // the weights had moved when it was sent
  double usual_move_ = 0.0;    // moving average of the mean |move| of an element
  bool warned_move_ = false;
  bool warned_gain_ = false;
  std::uint64_t published_ = 0;  // this module's part of the group's checksum
};

}  // namespace distro::exchange
