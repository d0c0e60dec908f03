#include "backend/c10d/device_dispatch.h"

#include <utility>

#include "backend/c10d/staged_backend.h"

namespace distro::c10d_backend {
namespace {

using Work = DeviceDispatch::Work;

// NCCL has no bitwise reductions.
bool is_bitwise(const c10d::ReduceOp& op) {
  return op == c10d::ReduceOp::BAND || op == c10d::ReduceOp::BOR || op == c10d::ReduceOp::BXOR;
}

}  // namespace

DeviceDispatch::DeviceDispatch(SharedBackend host, MakeBackend make_device, bool stage_host)
    : Backend(host->getRank(), host->getSize()),
      host_(std::move(host)),
      staged_(share(c10::make_intrusive<StagedBackend>(host_))),
      has_device_(static_cast<bool>(make_device)),
      stage_host_(stage_host),
      make_device_(std::move(make_device)) {}

// NCCL's destructor takes a backend that was not shut down for a mistake of the script.
DeviceDispatch::~DeviceDispatch() {
  if (device_) {
    try {
      device_->shutdown();
    } catch (const std::exception&) {
      // a peer is gone: there is nothing left to shut down
    }
  }
}

c10d::Backend& DeviceDispatch::of(at::Device device, bool on_device) {
  // The description cannot be overridden, and comes before the first collective.
  std::call_once(described_, [this] { host_->setGroupDesc(getGroupDesc()); });
  if (device.is_cpu()) {
    return stage_host_ ? *staged_ : *host_;
  }
  if (!has_device_ || !on_device) {
    return *staged_;
  }
  const std::lock_guard lock(mutex_);
  if (!device_) {
    device_ = share(make_device_());
    device_->setGroupUid(getGroupUid());
    device_->setGroupDesc(getGroupDesc());
    make_device_ = {};
  }
  return *device_;
}

c10d::Backend& DeviceDispatch::of(const Tensors& tensors, bool on_device) {
  return tensors.empty() ? *host_ : of(tensors.front().device(), on_device);
}

c10d::Backend* DeviceDispatch::made() {
  const std::lock_guard lock(mutex_);
  return device_.get();
}

Work DeviceDispatch::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  return of(tensors).broadcast(tensors, options);
}

Work DeviceDispatch::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  return of(tensors, !is_bitwise(options.reduceOp)).allreduce(tensors, options);
}

Work DeviceDispatch::allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) {
  return of(tensors, false).allreduce_sparse(tensors, options);
}

Work DeviceDispatch::allreduce_coalesced(Tensors& tensors,
                                         const c10d::AllreduceCoalescedOptions& options) {
  return of(tensors, !is_bitwise(options.reduceOp)).allreduce_coalesced(tensors, options);
}

Work DeviceDispatch::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  return of(tensors, !is_bitwise(options.reduceOp)).reduce(tensors, options);
}

Work DeviceDispatch::allgather(TensorLists& outputs, Tensors& inputs,
                               const c10d::AllgatherOptions& options) {
  return of(inputs).allgather(outputs, inputs, options);
}

Work DeviceDispatch::_allgather_base(at::Tensor& output, at::Tensor& input,
                                     const c10d::AllgatherOptions& options) {
  return of(input.device())._allgather_base(output, input, options);
}

Work DeviceDispatch::allgather_coalesced(TensorLists& outputs, Tensors& inputs,
                                         const c10d::AllgatherOptions& options) {
  return of(inputs, false).allgather_coalesced(outputs, inputs, options);
}

Work DeviceDispatch::allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                     const c10d::AllgatherOptions& options) {
  return of(inputs).allgather_into_tensor_coalesced(outputs, inputs, options);
}

Work DeviceDispatch::gather(TensorLists& outputs, Tensors& inputs,
                            const c10d::GatherOptions& options) {
  return of(inputs).gather(outputs, inputs, options);
}

Work DeviceDispatch::scatter(Tensors& outputs, TensorLists& inputs,
                             const c10d::ScatterOptions& options) {
  return of(outputs).scatter(outputs, inputs, options);
}

Work DeviceDispatch::reduce_scatter(Tensors& outputs, TensorLists& inputs,
                                    const c10d::ReduceScatterOptions& options) {
  return of(outputs, !is_bitwise(options.reduceOp)).reduce_scatter(outputs, inputs, options);
}

Work DeviceDispatch::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                          const c10d::ReduceScatterOptions& options) {
  return of(input.device(), !is_bitwise(options.reduceOp))
      ._reduce_scatter_base(output, input, options);
}

Work DeviceDispatch::reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                     const c10d::ReduceScatterOptions& options) {
  return of(inputs, !is_bitwise(options.reduceOp))
      .reduce_scatter_tensor_coalesced(outputs, inputs, options);
}

Work DeviceDispatch::alltoall_base(at::Tensor& output, at::Tensor& input, Splits& output_splits,
                                   Splits& input_splits, const c10d::AllToAllOptions& options) {
  return of(input.device()).alltoall_base(output, input, output_splits, input_splits, options);
}

Work DeviceDispatch::alltoall(Tensors& outputs, Tensors& inputs,
                              const c10d::AllToAllOptions& options) {
  return of(inputs).alltoall(outputs, inputs, options);
}

// A pair of sends and receives that are not begun as one group may wait for each other for ever in
// NCCL's stream (torch begins them one by one where a backend does not coalesce); by host memory
// they cannot, and a receiver need not know the sender.
Work DeviceDispatch::send(Tensors& tensors, int destination, int tag) {
  return of(tensors, false).send(tensors, destination, tag);
}

Work DeviceDispatch::recv(Tensors& tensors, int source, int tag) {
  return of(tensors, false).recv(tensors, source, tag);
}

Work DeviceDispatch::recvAnysource(Tensors& tensors, int tag) {
  return of(tensors, false).recvAnysource(tensors, tag);
}

Work DeviceDispatch::barrier(const c10d::BarrierOptions& options) {
  return of(options.device.value_or(at::Device(at::kCPU))).barrier(options);
}

void DeviceDispatch::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  host_->monitoredBarrier(options, wait_all_ranks);
}

void DeviceDispatch::setSequenceNumberForGroup() { host_->setSequenceNumberForGroup(); }

uint64_t DeviceDispatch::getSequenceNumberForGroup() { return host_->getSequenceNumberForGroup(); }

void DeviceDispatch::setGroupUid(const std::string& uid) {
  Backend::setGroupUid(uid);
  host_->setGroupUid(uid);
  if (auto* const device = made()) {
    device->setGroupUid(uid);
  }
}

void DeviceDispatch::setTimeout(std::chrono::milliseconds timeout) {
  host_->setTimeout(timeout);
  if (auto* const device = made()) {
    device->setTimeout(timeout);
  }
}

void DeviceDispatch::shutdown() {
  if (auto* const device = made()) {
    device->shutdown();
  }
  host_->shutdown();
}

void DeviceDispatch::abort() {
  if (auto* const device = made()) {
    device->abort();
  }
  host_->abort();
}

}  // namespace distro::c10d_backend
