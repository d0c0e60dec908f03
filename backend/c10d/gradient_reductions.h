#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

#include "backend/c10d/inner_backend.h"
#include "backend/c10d/operations.h"
#include "backend/c10d/residual_table.h"
#include "backend/exchange/group.h"
#include "backend/exchange/reduction.h"

namespace distro::c10d_backend {

class ReductionWork;

/// Modes ef and demo of one process group: tells gradient reductions from other collectives and
/// hands both to the engine (exchange::Reductions), since what is one on any rank is one on all.
/// Thread-safe. Used only while the group's engine runs.
class GradientReductions {
 public:
  /// `ordered`: runs what turns out to be exact, in the order of the engine. A backend of its own,
  /// because gloo tells collectives apart by the order of calls, and the script's thread calls the
  /// other one meanwhile.
  GradientReductions(std::shared_ptr<exchange::Group> group, InnerBackend ordered,
                     std::shared_ptr<Operations> operations);

  /// Whether an all-reduce is, or looks like, a gradient reduction; the same on all ranks.
  [[nodiscard]] bool takes(const std::vector<at::Tensor>& tensors,
                           const c10d::AllreduceOptions& options) const;
  /// Run one that takes() takes.
  c10::intrusive_ptr<c10d::Work> allreduce(const std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options,
                                           const Operations::Ticket& ticket);

  /// The same for a reduce-scatter; none is taken unless they are to be compressed.
  [[nodiscard]] bool takes(const at::Tensor& output, const at::Tensor& input,
                           const c10d::ReduceScatterOptions& options) const;
  c10::intrusive_ptr<c10d::Work> reduce_scatter(const at::Tensor& output, const at::Tensor& input,
                                                const c10d::ReduceScatterOptions& options,
                                                const Operations::Ticket& ticket);

  /// The mean over all ranks of these gradients, in place; `buffer` holds them all and is the
  /// Work's result. One residual for each.
  c10::intrusive_ptr<c10d::Work> mean(const at::Tensor& buffer,
                                      std::vector<exchange::TensorSpec> tensors,
                                      const std::vector<at::Tensor>& gradients,
                                      Residuals residuals);

  /// From now on every collective of the script is exact: it reduces gradients in a way of its own.
  /// What it says to the other ranks stays, so that a rank that does otherwise is found.
  void stop_recognising(const std::string& reason);

  [[nodiscard]] const std::shared_ptr<exchange::Group>& group() const noexcept { return group_; }

  /// End of the process group, after the engine's.
  void abort();
  void set_timeout(std::chrono::milliseconds timeout);

 private:
  void submit(const c10::intrusive_ptr<ReductionWork>& work, exchange::Reduction reduction);
  void count_exact(const at::Tensor& input);
  // Exact or not, and with which residuals.
  void recognise(exchange::Reduction& reduction, std::size_t inputs, std::size_t elements);

  const std::shared_ptr<exchange::Group> group_;
  const InnerBackend ordered_;
  const std::shared_ptr<Operations> operations_;
  const std::shared_ptr<ResidualTable> residuals_;
  std::atomic<bool> recognises_{true};
};

}  // namespace distro::c10d_backend
