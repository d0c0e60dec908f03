#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/reducer.hpp>
#include <vector>

#include "backend/c10d/process_group_distro.h"
#include "backend/exchange/weights_exchange.h"

namespace distro::c10d_backend {

/// `weights` mode of one wrapped module: between its hooks (a comm hook on DDP's reducer, a
/// forward-pre hook on the wrapper) and the exchange. Lives as long as the wrapper; holds the
/// parameters, not the wrapper. Of hybrid sharding the parameters are this rank's shards, the group
/// is that of their replicas, and take() stands in for the comm hook.
///
/// Everything runs on the thread that trains the module; the counters of backwards are atomic
/// because autograd may run the reducer's hook on a thread of its own.
class ModuleSynchroniser : public ReplicaGradients {
 public:
  /// `parameters`: the trainable ones, each once, in the same order on all ranks; floating point,
  /// all on one device, which may be another on other ranks. None where the module is to stay
  /// exact. Takes the group's next module ordinal. `device_codec`: for tests, use the codec of
  /// devices on the CPU, too. Throws exchange::OptionError where the module is too large for the
  /// options.
  ModuleSynchroniser(const c10::intrusive_ptr<ProcessGroupDistro>& backend,
                     std::vector<at::Tensor> parameters, const std::vector<std::string>& names,
                     bool device_codec = false);

  /// Register the comm hook that hands every gradient bucket back as it is. Before the first
  /// backward, once.
  static void attach(const std::shared_ptr<ModuleSynchroniser>& synchroniser,
                     const std::shared_ptr<c10d::Reducer>& reducer);

  /// The wrapper's training forward is about to begin (gradients enabled, synchronisation
  /// required): the one place where the module is exchanged. Collective. Throws
  /// c10::DistBackendError.
  void before_forward();

  /// Before before_forward(). `joined`: under DDP's join(), whether this rank has run out of data;
  /// elsewhere nothing. Ranks of a site that have take the weights of one that has not, for their
  /// own optimizers rest; and since these differ from then on, all take one's in later exchanges,
  /// too. Collective in the site. Throws c10::DistBackendError.
  void take_site(std::optional<bool> joined);

  /// The optimizer of these parameters was seen; `normalises`: its steps do not scale with the
  /// gradient (not SGD).
  void set_optimizer(bool normalises);

  /// Watch parameters that were frozen when the module was wrapped, which nobody shares: training
  /// one of them later is warned of.
  void watch_frozen(std::vector<at::Tensor> parameters, std::vector<std::string> names);

  /// The script has overwritten weights: all ranks take the mean at their next exchange.
  void mark();

  /// The script is about to overwrite weights, and has done so. If at the next exchange the weights
  /// are what they were before the first such edit (an average of weights was swapped in for an
  /// evaluation, and out again), nothing has happened; else as mark().
  void before_edit();
  void after_edit();

  /// Do not exchange the module (any more), because of `reason`. Ranks agree about it at the next
  /// training forward; gradients are reduced exactly from then on.
  void stay_exact(const std::string& reason);

  /// The exact mean of all ranks' weights, in place. Collective. Throws c10::DistBackendError.
  void average();

  /// The parameters become the reference W (nothing happens before the first training forward), and
  /// what they were again. In between the module is neither exchanged nor averaged. Throws
  /// c10::Error where one does not follow the other.
  void show_reference();
  void hide_reference();

  /// The reducer's hook, for each gradient bucket.
  c10::intrusive_ptr<c10::ivalue::Future> on_bucket(c10d::GradBucket& bucket);

  /// A gradient of the shards, which FSDP is about to reduce over the replicas.
  bool take(at::Tensor& gradient, const c10d::ReduceOp& op) override;

  [[nodiscard]] bool exact() const noexcept { return exact_; }
  /// Whether there is something to exchange: a synchronised backward since the last sync point.
  [[nodiscard]] bool backward_done() const noexcept { return backward_done_; }
  [[nodiscard]] std::uint64_t exchanges() const { return exchange_.exchanges(); }
  [[nodiscard]] std::uint64_t checksum() const { return exchange_.checksum(); }
  /// The state of this rank, for a per-rank checkpoint; and its return, before the first training
  /// forward.
  [[nodiscard]] exchange::ModuleState state();
  void load(const exchange::ModuleState& state);

 private:
  template <typename Step>
  void together(const char* what, Step&& step);
  [[nodiscard]] float gain() const;
  void note_training();
  void heed_training();
  void heed_edit();
  void note_apart(bool some_without_data);
  [[nodiscard]] std::uint64_t fingerprint() const;
  void check_own_weights(const char* what) const;
  // Run `use` on views of the parameters' memory as it is now, in logical order; what it writes
  // reaches the parameters (writes: it does write).
  template <typename Use>
  void with_views(Use&& use, bool writes = true);

  const std::shared_ptr<exchange::Group> group_;
  const InnerBackend inner_;
  const std::optional<InnerBackend> site_;
  const std::shared_ptr<Operations> operations_;
  const std::vector<at::Tensor> parameters_;
  const at::Device device_;
  exchange::WeightsExchange exchange_;
  std::atomic<bool> backward_done_{false};  // a synchronised backward since the last sync point
  std::atomic<bool> exact_{false};          // agreed
  std::string reason_exact_;                // why it is to be; empty: it is not
  std::optional<bool> normalises_;
  bool apart_ = false;                // the site's optimizers have not seen the same steps
  std::int64_t last_with_data_ = -1;  // under join(): of the site's ranks, at the last exchange
  std::optional<std::vector<at::Tensor>> own_;  // the weights, while W is in their place
  std::optional<std::uint64_t> before_edit_;    // fingerprint of the weights before the first edit

  // requires_grad, as the last synchronised backward found it: a script may change it between a
  // forward and a backward, and back (as GANs do), without anything being frozen.
  std::vector<at::Tensor> frozen_;  // when the module was wrapped
  std::vector<std::string> frozen_names_;
  std::vector<char> training_;  // by parameter
  std::atomic<bool> newly_frozen_{false};
  std::atomic<std::ptrdiff_t> thawed_{-1};  // index into frozen_
  bool warned_thawed_ = false;
};

}  // namespace distro::c10d_backend
