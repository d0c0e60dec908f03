#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

#include "backend/exchange/group.h"
#include "backend/exchange/transfers.h"

namespace distro::c10d_backend {

/// Exact collectives on tensors of the CPU over the group's own transport, in place of Gloo
/// (docs/adr/0016): every rank gets the bytes of all and reduces them in the order of the ranks, so
/// that all have the same bits. Of all or some of the group's ranks. Thread-safe; all ranks issue
/// the same collectives in the same order.
///
/// Errors of a call's tensors are torch's (ValueError, TypeError); those of the network are
/// transport::PeerError and exchange::ExchangeError, by the Work or, after a failure, by the call.
class TransportBackend final : public c10d::Backend {
 public:
  using Work = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<at::Tensor>;
  using TensorLists = std::vector<std::vector<at::Tensor>>;
  using Splits = std::vector<std::int64_t>;

  /// `members`: ranks of the group, this one among them, in the same order on all of them; each
  /// stream belongs to one backend of the group. A backend of one rank needs no transport.
  TransportBackend(std::shared_ptr<exchange::Group> group, std::chrono::milliseconds timeout,
                   std::uint32_t stream, std::vector<int> members);

  const std::string getBackendName() const override { return "distro-transport"; }

  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  /// Sparse tensors as well (SUM).
  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  Work allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  Work allreduce_coalesced(Tensors& tensors,
                           const c10d::AllreduceCoalescedOptions& options) override;
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& options) override;
  /// The ranks' tensors may have different sizes, if every rank's outputs have them.
  Work allgather(TensorLists& outputs, Tensors& inputs,
                 const c10d::AllgatherOptions& options) override;
  Work _allgather_base(at::Tensor& output, at::Tensor& input,
                       const c10d::AllgatherOptions& options) override;
  Work allgather_coalesced(TensorLists& outputs, Tensors& inputs,
                           const c10d::AllgatherOptions& options) override;
  Work allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                       const c10d::AllgatherOptions& options) override;
  Work gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override;
  Work scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) override;
  Work reduce_scatter(Tensors& outputs, TensorLists& inputs,
                      const c10d::ReduceScatterOptions& options) override;
  Work _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                            const c10d::ReduceScatterOptions& options) override;
  Work reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                       const c10d::ReduceScatterOptions& options) override;
  Work alltoall_base(at::Tensor& output, at::Tensor& input, Splits& output_splits,
                     Splits& input_splits, const c10d::AllToAllOptions& options) override;
  Work alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override;
  Work send(Tensors& tensors, int destination, int tag) override;
  Work recv(Tensors& tensors, int source, int tag) override;
  Work recvAnysource(Tensors& tensors, int tag) override;
  Work barrier(const c10d::BarrierOptions& options) override;
  /// Throws c10::DistBackendError on every rank; on rank 0 it names those that did not come. The
  /// group can be used after that.
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override;

  /// Nothing to agree on: every rank counts its collectives from the start.
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return sequence_; }
  void enableCollectivesTiming() override {}

  /// How long later operations wait for other ranks.
  void setTimeout(std::chrono::milliseconds timeout) override { timeout_ = timeout; }
  /// Everything under way on this rank fails, now and from now on.
  void abort() override;

 private:
  // Monitored barriers of a backend send their messages on a stream of their own, so many above
  // its.
  static constexpr std::uint32_t kMonitorStreams = exchange::kMaxStreams / 2;

  // A call: one or more collectives of the engine, one Work.
  class Call;

  [[nodiscard]] int member(int rank) const { return members_[static_cast<std::size_t>(rank)]; }
  [[nodiscard]] std::vector<int> others() const;
  [[nodiscard]] std::chrono::milliseconds timeout(std::chrono::milliseconds given) const;
  void check_rank(std::int64_t rank, const char* what) const;

  // Parts of a call.
  void add_reduction(Call& call, at::Tensor& result, const Tensors& inputs,
                     const c10d::ReduceOp& op, exchange::TransferOperation operation) const;
  void add_gather(Call& call, const Tensors& outputs, const at::Tensor& input) const;
  void add_sparse(Call& call, at::Tensor& tensor) const;
  Work begin(const std::shared_ptr<Call>& call, std::chrono::milliseconds timeout);
  class MonitorMessage;
  std::shared_ptr<MonitorMessage> monitor_want(int rank, std::chrono::milliseconds timeout);
  void monitor_send(int rank, std::uint64_t barrier);
  Work receive(Tensors& tensors, std::optional<int> source, int tag);

  const std::shared_ptr<exchange::Group> group_;
  const std::uint32_t stream_;
  const std::vector<int> members_;
  std::atomic<std::chrono::milliseconds> timeout_;
  std::atomic<std::uint64_t> sequence_{0};
  std::atomic<std::uint64_t> monitored_{0};  // monitored barriers so far
};

}  // namespace distro::c10d_backend
