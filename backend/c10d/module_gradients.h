#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/reducer.hpp>
#include <unordered_map>
#include <vector>

#include "backend/c10d/process_group_distro.h"

namespace distro::c10d_backend {

/// Modes ef and demo of one DDP module: its comm hook, and the residuals of its parameters. Keyed
/// by parameter, so that they outlive DDP's rebuilding of its buckets. Lives as long as the
/// wrapper; holds the parameters, not the wrapper. Thread-safe.
class ModuleGradients {
 public:
  /// `parameters`: the trainable ones, each once, with their names for error texts. Throws
  /// c10::ValueError if the backend is in another mode or of one rank.
  ModuleGradients(const c10::intrusive_ptr<ProcessGroupDistro>& backend,
                  std::vector<at::Tensor> parameters, const std::vector<std::string>& names);

  /// Register the comm hook that reduces every gradient bucket by the engine. Before the first
  /// backward, once.
  static void attach(const std::shared_ptr<ModuleGradients>& module,
                     const std::shared_ptr<c10d::Reducer>& reducer);

  /// The reducer's hook: the mean of the bucket over all ranks. Buckets of fewer than min_elements,
  /// and sparse ones, are reduced exactly.
  c10::intrusive_ptr<c10::ivalue::Future> on_bucket(c10d::GradBucket& bucket);

  /// Synchronised backwards so far.
  [[nodiscard]] std::uint64_t backwards() const noexcept { return backwards_; }

  /// What this rank has not sent of each parameter's gradient (plugins::Residual), in the
  /// parameters' order, flat; none where nothing was compressed yet. Not while a backward
  /// runs.
  [[nodiscard]] std::vector<std::optional<at::Tensor>> residuals();

  /// The return of residuals() and backwards(), for a resume. Throws c10::ValueError, and changes
  /// nothing, where they are not of these parameters. Not while a backward runs.
  void load(const std::vector<std::optional<at::Tensor>>& residuals, std::uint64_t backwards);

 private:
  c10::intrusive_ptr<c10::ivalue::Future> exact_mean(at::Tensor& buffer);

  const std::shared_ptr<GradientReductions> reductions_;
  const InnerBackend inner_;
  const std::shared_ptr<Operations> operations_;
  const std::vector<at::Tensor> parameters_;
  std::unordered_map<const void*, std::string> names_;  // by parameter
  std::mutex mutex_;
  // By parameter, guarded by mutex_.
  std::unordered_map<const void*, std::shared_ptr<plugins::Residual>> residuals_;
  std::atomic<std::uint64_t> backwards_{0};
};

}  // namespace distro::c10d_backend
