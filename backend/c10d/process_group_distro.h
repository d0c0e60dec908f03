#pragma once

#include <functional>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

#include "backend/c10d/inner_backend.h"
#include "backend/exchange/group.h"

namespace distro::c10d_backend {

/// The `distro` backend of one process group. Collectives run exactly in the inner backend (Gloo);
/// what is compressed in `weights` mode does not come this way but through ModuleSynchroniser.
///
/// Overrides carry the names of torch 2.11; the `_single` names of later versions forward to them.
/// There is no `override` where 2.11 lacks the member. Thread-safe as the inner backend is.
class ProcessGroupDistro : public c10d::Backend {
 public:
  /// `inner` runs what stays exact; it has the same ranks as `group`.
  ProcessGroupDistro(std::shared_ptr<exchange::Group> group, InnerBackend inner);
  ~ProcessGroupDistro() override;

  [[nodiscard]] const std::shared_ptr<exchange::Group>& group() const noexcept { return group_; }
  [[nodiscard]] const InnerBackend& inner() const noexcept { return inner_; }

  const std::string getBackendName() const override { return "distro"; }

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

  void setSequenceNumberForGroup() override;
  uint64_t getSequenceNumberForGroup() override;
  void setTimeout(std::chrono::milliseconds timeout) override;

  /// Deliver what is in flight, say goodbye, close. Called by destroy_process_group.
  void shutdown() override;
  void abort() override;

 private:
  using Start = std::function<c10::intrusive_ptr<c10d::Work>()>;

  // Run a collective in the inner backend and count it. `outputs`: the future's value where the
  // inner Work gives none.
  c10::intrusive_ptr<c10d::Work> exact(c10d::OpType operation, std::size_t bytes,
                                       std::vector<at::Tensor> outputs, const Start& start,
                                       std::function<void()> last_act = {});
  // SUM where the caller asked for AVG: the division is ours.
  [[nodiscard]] std::function<void()> division(const c10d::ReduceOp& op,
                                               std::vector<at::Tensor> outputs) const;

  const std::shared_ptr<exchange::Group> group_;
  const InnerBackend inner_;
};

}  // namespace distro::c10d_backend
