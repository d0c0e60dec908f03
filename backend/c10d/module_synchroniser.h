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
/// parameters, not the wrapper.
///
/// Everything runs on the thread that trains the module; the counters of backwards are atomic
/// because autograd may run the reducer's hook on a thread of its own.
class ModuleSynchroniser {
 public:
  /// `parameters`: the trainable ones, each once, in the same order on all ranks; floating point,
  /// on the CPU.
  ModuleSynchroniser(const c10::intrusive_ptr<ProcessGroupDistro>& backend,
                     std::vector<at::Tensor> parameters, const std::vector<std::string>& names);

  /// Register the comm hook that hands every gradient bucket back as it is. Before the first
  /// backward, once.
  static void attach(const std::shared_ptr<ModuleSynchroniser>& synchroniser,
                     const std::shared_ptr<c10d::Reducer>& reducer);

  /// The wrapper's training forward is about to begin (gradients enabled, synchronisation
  /// required): the one place where the module is exchanged. Collective. Throws
  /// c10::DistBackendError.
  void before_forward();

  /// The optimizer of these parameters was seen; `normalises`: its steps do not scale with the
  /// gradient (not SGD).
  void set_optimizer(bool normalises);

  /// The script has overwritten weights.
  void mark();

  /// Stop exchanging: from the next backward on gradients are all-reduced exactly (a sharded
  /// optimizer was seen).
  void go_exact();

  /// The exact mean of all ranks' weights, in place. Collective. Throws c10::DistBackendError.
  void average();

  /// The reducer's hook, for each gradient bucket.
  c10::intrusive_ptr<c10::ivalue::Future> on_bucket(c10d::GradBucket& bucket);

  [[nodiscard]] bool exact() const noexcept { return exact_; }
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
  // Run `use` on views of the parameters' memory as it is now, in logical order; what it writes
  // reaches the parameters (writes: it does write).
  template <typename Use>
  void with_views(Use&& use, bool writes = true);

  const std::shared_ptr<exchange::Group> group_;
  const InnerBackend inner_;
  const std::shared_ptr<Operations> operations_;
  const std::vector<at::Tensor> parameters_;
  exchange::WeightsExchange exchange_;
  std::atomic<bool> backward_done_{false};  // a synchronised backward since the last sync point
  std::atomic<bool> exact_{false};
  std::optional<bool> normalises_;
};

}  // namespace distro::c10d_backend
