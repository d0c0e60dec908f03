#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

#include "backend/c10d/inner_backend.h"

namespace distro::c10d_backend {

/// The inner backend of a group for tensors of any device (ADR 0013): on the CPU, Gloo; on a GPU,
/// NCCL if every rank has a GPU for itself, else Gloo by way of host memory. What decides is equal
/// on all ranks: the group's agreement on NCCL, and the operation.
class DeviceDispatch final : public c10d::Backend {
 public:
  using Work = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<at::Tensor>;
  using TensorLists = std::vector<std::vector<at::Tensor>>;
  using Splits = std::vector<std::int64_t>;
  using MakeBackend = std::function<c10::intrusive_ptr<c10d::Backend>()>;

  /// `host`: the CPU's. `make_device`: makes NCCL's, called at the first collective that needs it;
  /// empty: never use one. `stage_host`: for tests, stage tensors on the CPU, too.
  DeviceDispatch(SharedBackend host, MakeBackend make_device, bool stage_host = false);

  ~DeviceDispatch() override;

  const std::string getBackendName() const override { return "distro-inner"; }

  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  Work allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  Work allreduce_coalesced(Tensors& tensors,
                           const c10d::AllreduceCoalescedOptions& options) override;
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& options) override;
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
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override;

  void setSequenceNumberForGroup() override;
  uint64_t getSequenceNumberForGroup() override;
  void setGroupUid(const std::string& uid) override;
  void setTimeout(std::chrono::milliseconds timeout) override;
  void shutdown() override;
  void abort() override;

 private:
  // The backend for tensors of this device; `on_device`: NCCL has the operation.
  c10d::Backend& of(at::Device device, bool on_device = true);
  c10d::Backend& of(const Tensors& tensors, bool on_device = true);
  // NCCL's if it has been made; null otherwise.
  c10d::Backend* made();

  const SharedBackend host_;
  const SharedBackend staged_;
  const bool has_device_;
  const bool stage_host_;
  std::once_flag described_;
  std::mutex mutex_;  // guards the rest
  MakeBackend make_device_;
  SharedBackend device_;
};

}  // namespace distro::c10d_backend
