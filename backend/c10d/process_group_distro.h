#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <utility>
#include <vector>

#include "backend/c10d/capabilities.h"
#include "backend/c10d/exact_work.h"
#include "backend/c10d/gradient_reductions.h"
#include "backend/c10d/inner_backend.h"
#include "backend/c10d/operations.h"
#include "backend/c10d/replicas.h"
#include "backend/c10d/torch_version.h"
#include "backend/exchange/group.h"

namespace distro::c10d_backend {

/// The `distro` backend of one process group. Collectives run exactly in the inner backend (Gloo);
/// what is compressed in `weights` mode does not come this way but through ModuleSynchroniser. In
/// modes ef and demo gradient reductions go to GradientReductions.
///
/// Overrides carry the names of torch 2.11; the `_single` names of later versions forward to them.
/// There is no `override` where 2.11 lacks the member. Thread-safe as the inner backend is.
class ProcessGroupDistro : public c10d::Backend {
 public:
  /// What a group was made with, so that one like it can be split off.
  struct Options : c10d::Backend::Options {
    explicit Options(std::chrono::milliseconds timeout_)
        : c10d::Backend::Options("distro", timeout_) {}
    /// No `override`: torch before 2.14 shares options instead of cloning them.
    [[nodiscard]] c10::intrusive_ptr<c10d::Backend::Options> clone() const {
      return c10::make_intrusive<Options>(*this);
    }

    exchange::StringMap overrides;  ///< pg_options as text; win over the DISTRO_ variables.
  };

  /// Makes the backend of a group that is split off, on its members; `rank` of `size`. Collective.
  using MakeChild = std::function<c10::intrusive_ptr<c10d::Backend>(
      const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
      const c10::intrusive_ptr<Options>& options)>;

  /// `inner` runs what stays exact; it has the same ranks as `group`. `ordered`: another such
  /// backend, for what modes ef and demo find to be exact; null in other modes. `site`: one of the
  /// ranks of this rank's site, which is neither this rank alone nor the whole group; else null.
  ProcessGroupDistro(std::shared_ptr<exchange::Group> group, InnerBackend inner,
                     const std::optional<InnerBackend>& ordered, std::optional<InnerBackend> site,
                     c10::intrusive_ptr<Options> options, MakeChild make_child);
  ~ProcessGroupDistro() override;

  [[nodiscard]] const std::shared_ptr<exchange::Group>& group() const noexcept { return group_; }
  [[nodiscard]] const InnerBackend& inner() const noexcept { return inner_; }
  [[nodiscard]] const std::optional<InnerBackend>& site() const noexcept { return site_; }
  [[nodiscard]] const std::shared_ptr<Operations>& operations() const noexcept {
    return operations_;
  }
  /// Null but in modes ef and demo with more than one rank.
  [[nodiscard]] const std::shared_ptr<GradientReductions>& gradients() const noexcept {
    return gradients_;
  }

  /// Until the next call, all-reduces of this group are the gradients of `replicas` (null:
  /// nobody's, they are exact). FSDP's reductions are bracketed by it: nothing else reduces there.
  void hand_replicas_to(std::shared_ptr<ReplicaGradients> replicas);

  const std::string getBackendName() const override { return "distro"; }
  c10::intrusive_ptr<c10d::Backend::Options> getBackendOptions() override { return options_; }
  void setGroupUid(const std::string& uid) override;

  bool supportsSplitting() const override { return Capabilities::splitting; }
  bool supportsCoalescing() const override { return Capabilities::coalescing; }

  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors,
                                           const c10d::BroadcastOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allreduce_sparse(std::vector<at::Tensor>& tensors,
                                                  const c10d::AllreduceOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allreduce_coalesced(
      std::vector<at::Tensor>& tensors, const c10d::AllreduceCoalescedOptions& options) override;
  c10::intrusive_ptr<c10d::Work> reduce(std::vector<at::Tensor>& tensors,
                                        const c10d::ReduceOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                                 const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allgather_coalesced(
      std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
      const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allgather_into_tensor_coalesced(
      std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs,
      const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<c10d::Work> gather(std::vector<std::vector<at::Tensor>>& outputs,
                                        std::vector<at::Tensor>& inputs,
                                        const c10d::GatherOptions& options) override;
  /// `output`, on the root: the ranks' inputs one after the other. Torch before 2.14 has no such
  /// member, and so there is no `override`.
  c10::intrusive_ptr<c10d::Work> gather_into_tensor(at::Tensor& output, at::Tensor& input,
                                                    const c10d::GatherOptions& options);
  c10::intrusive_ptr<c10d::Work> scatter(std::vector<at::Tensor>& outputs,
                                         std::vector<std::vector<at::Tensor>>& inputs,
                                         const c10d::ScatterOptions& options) override;
  c10::intrusive_ptr<c10d::Work> reduce_scatter(std::vector<at::Tensor>& outputs,
                                                std::vector<std::vector<at::Tensor>>& inputs,
                                                const c10d::ReduceScatterOptions& options) override;
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(
      at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override;
  c10::intrusive_ptr<c10d::Work> reduce_scatter_tensor_coalesced(
      std::vector<at::Tensor>& outputs, std::vector<at::Tensor>& inputs,
      const c10d::ReduceScatterOptions& options) override;
  c10::intrusive_ptr<c10d::Work> alltoall_base(at::Tensor& output, at::Tensor& input,
                                               std::vector<int64_t>& output_splits,
                                               std::vector<int64_t>& input_splits,
                                               const c10d::AllToAllOptions& options) override;
  c10::intrusive_ptr<c10d::Work> alltoall(std::vector<at::Tensor>& outputs,
                                          std::vector<at::Tensor>& inputs,
                                          const c10d::AllToAllOptions& options) override;
  c10::intrusive_ptr<c10d::Work> send(std::vector<at::Tensor>& tensors, int destination,
                                      int tag) override;
  c10::intrusive_ptr<c10d::Work> recv(std::vector<at::Tensor>& tensors, int source,
                                      int tag) override;
  c10::intrusive_ptr<c10d::Work> recvAnysource(std::vector<at::Tensor>& tensors, int tag) override;
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& options) override;
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override;

  /// Nothing to agree on: every rank counts its collectives from the start.
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return operations_->sequence(); }
  void enableCollectivesTiming() override { inner_->enableCollectivesTiming(); }
  c10d::ErrorType getError() override { return inner_->getError(); }

  /// How long later operations, exact or exchanged, wait for other ranks.
  void setTimeout(std::chrono::milliseconds timeout) override;

  /// A new group of some of this one's ranks, with this one's options; null on the others. `ranks`
  /// of this group, in the order of the new one. Collective among the members.
  c10::intrusive_ptr<c10d::Backend> split(
      const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
      const c10::intrusive_ptr<c10d::Backend::Options>& options) override;

  /// Deliver what is in flight, say goodbye, close. Called by destroy_process_group.
  void shutdown() override;
  void abort() override;

#if DISTRO_TORCH_AT_LEAST(15)
  bool supportsCompletionHooks() const override { return Capabilities::completion_hooks; }
  void registerCompletionHook(int64_t id, c10d::CompletionHook hook) override {
    operations_->add_completion_hook(id, [hook = std::move(hook)](std::uint64_t key) {
      hook({.completionKey = key, .duration_ms = std::nullopt});
    });
  }
  void unregisterCompletionHook(int64_t id) override { operations_->remove_completion_hook(id); }
  bool supportsAbortHooks() const override { return Capabilities::abort_hooks; }
  void registerAbortHook(int64_t id, c10d::AbortHook hook) override {
    operations_->add_abort_hook(id, std::move(hook));
  }
  void unregisterAbortHook(int64_t id) override { operations_->remove_abort_hook(id); }
#endif

 private:
  // Run an operation in the inner backend and count it. `title` is what the profiler shows,
  // "distro:all_reduce", static text; `outputs` are also the future's value where the inner Work
  // gives none.
  c10::intrusive_ptr<c10d::Work> exact(c10d::OpType operation, const char* title,
                                       std::vector<at::Tensor> inputs,
                                       std::vector<at::Tensor> outputs,
                                       const ExactWork::Start& start,
                                       std::function<void()> last_act = {});
  // Number an operation, show it to the profiler while `start` runs, and remember it.
  c10::intrusive_ptr<c10d::Work> recorded(
      c10d::OpType operation, const char* title, const std::vector<at::Tensor>& inputs,
      const std::vector<at::Tensor>& outputs,
      const std::function<c10::intrusive_ptr<c10d::Work>(const Operations::Ticket&)>& start);
  [[nodiscard]] std::shared_ptr<ReplicaGradients> replicas();
  void observe_failures();

  const std::shared_ptr<exchange::Group> group_;
  const InnerBackend inner_;
  const std::optional<InnerBackend> site_;
  const c10::intrusive_ptr<Options> options_;
  const MakeChild make_child_;
  const std::shared_ptr<Operations> operations_;
  const std::shared_ptr<GradientReductions> gradients_;
  std::mutex replicas_mutex_;
  std::shared_ptr<ReplicaGradients> replicas_;  // guarded by replicas_mutex_
  std::once_flag described_;                    // the inner backend got this group's description

  std::mutex split_mutex_;
  std::string last_split_name_;                        // guarded by split_mutex_
  c10::weak_intrusive_ptr<c10d::Backend> last_split_;  // guarded by split_mutex_
};

}  // namespace distro::c10d_backend
