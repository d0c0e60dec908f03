#include "backend/c10d/process_group_distro.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <utility>

#include "backend/c10d/errors.h"
#include "backend/c10d/exact_work.h"
#include "backend/c10d/python_lock.h"

namespace distro::c10d_backend {
namespace {

using c10d::OpType;
using c10d::ReduceOp;
using c10d::Work;
using Tensors = std::vector<at::Tensor>;
using TensorLists = std::vector<std::vector<at::Tensor>>;

std::size_t bytes_of(const Tensors& tensors) {
  std::size_t bytes = 0;
  for (const auto& tensor : tensors) {
    bytes += tensor.layout() == at::kStrided ? tensor.nbytes() : 0;
  }
  return bytes;
}

std::size_t bytes_of(const TensorLists& lists) {
  std::size_t bytes = 0;
  for (const auto& list : lists) {
    bytes += bytes_of(list);
  }
  return bytes;
}

// The options with SUM in place of AVG.
template <typename Options>
Options summing(Options options) {
  if (options.reduceOp == ReduceOp::AVG) {
    options.reduceOp = ReduceOp::SUM;
  }
  return options;
}

}  // namespace

ProcessGroupDistro::ProcessGroupDistro(std::shared_ptr<exchange::Group> group, InnerBackend inner)
    : Backend(group->rank(), group->world_size()),
      group_(std::move(group)),
      inner_(std::move(inner)) {
  init();
  group_->on_close([backend = inner_] { backend.release(); });
}

ProcessGroupDistro::~ProcessGroupDistro() {
  const WithoutPythonLock without_lock;  // closing may wait for peers
  group_->close();
}

c10::intrusive_ptr<Work> ProcessGroupDistro::exact(OpType operation, std::size_t bytes,
                                                   Tensors outputs, const Start& start,
                                                   std::function<void()> last_act) {
  group_->counters().exact.fetch_add(1, std::memory_order_relaxed);
  group_->counters().exact_bytes.fetch_add(bytes, std::memory_order_relaxed);
  if (const auto lost = group_->lost()) {
    fail_lost(*group_, c10d::opTypeToString(operation), *lost);
  }
  c10::intrusive_ptr<Work> inner_work;
  translate(*group_, c10d::opTypeToString(operation), [&] { inner_work = start(); });
  return c10::make_intrusive<ExactWork>(std::move(inner_work), group_, operation,
                                        std::move(outputs), std::move(last_act));
}

std::function<void()> ProcessGroupDistro::division(const ReduceOp& op, Tensors outputs) const {
  if (op != ReduceOp::AVG) {
    return {};
  }
  return [outputs = std::move(outputs), size = getSize()]() mutable {
    const at::NoGradGuard no_grad;
    for (auto& output : outputs) {
      if (at::isIntegralType(output.scalar_type(), /*includeBool=*/false)) {
        output.div_(size, "trunc");
      } else {
        output.div_(size);
      }
    }
  };
}

c10::intrusive_ptr<Work> ProcessGroupDistro::broadcast(Tensors& tensors,
                                                       const c10d::BroadcastOptions& options) {
  return exact(OpType::BROADCAST, bytes_of(tensors), tensors,
               [&] { return inner_->broadcast(tensors, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::allreduce(Tensors& tensors,
                                                       const c10d::AllreduceOptions& options) {
  return exact(
      OpType::ALLREDUCE, bytes_of(tensors), tensors,
      [&] { return inner_->allreduce(tensors, summing(options)); },
      division(options.reduceOp, tensors));
}

c10::intrusive_ptr<Work> ProcessGroupDistro::allreduce_sparse(
    Tensors& tensors, const c10d::AllreduceOptions& options) {
  return exact(OpType::_ALLREDUCE_SPARSE, bytes_of(tensors), tensors,
               [&] { return inner_->allreduce_sparse(tensors, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  return exact(
      OpType::ALLREDUCE_COALESCED, bytes_of(tensors), tensors,
      [&] { return inner_->allreduce_coalesced(tensors, summing(options)); },
      division(options.reduceOp, tensors));
}

c10::intrusive_ptr<Work> ProcessGroupDistro::reduce(Tensors& tensors,
                                                    const c10d::ReduceOptions& options) {
  return exact(
      OpType::REDUCE, bytes_of(tensors), tensors,
      [&] { return inner_->reduce(tensors, summing(options)); },
      options.rootRank == getRank() ? division(options.reduceOp, tensors)
                                    : std::function<void()>{});
}

c10::intrusive_ptr<Work> ProcessGroupDistro::allgather(TensorLists& outputs, Tensors& inputs,
                                                       const c10d::AllgatherOptions& options) {
  return exact(OpType::ALLGATHER, bytes_of(inputs), Tensors{},
               [&] { return inner_->allgather(outputs, inputs, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::_allgather_base(
    at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) {
  return exact(OpType::_ALLGATHER_BASE, input.nbytes(), {output},
               [&] { return inner_->_allgather_base(output, input, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::allgather_coalesced(
    TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  return exact(OpType::ALLGATHER_COALESCED, bytes_of(inputs), Tensors{},
               [&] { return inner_->allgather_coalesced(outputs, inputs, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  return exact(OpType::ALLGATHER_INTO_TENSOR_COALESCED, bytes_of(inputs), outputs,
               [&] { return inner_->allgather_into_tensor_coalesced(outputs, inputs, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::gather(TensorLists& outputs, Tensors& inputs,
                                                    const c10d::GatherOptions& options) {
  return exact(OpType::GATHER, bytes_of(inputs), Tensors{},
               [&] { return inner_->gather(outputs, inputs, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::scatter(Tensors& outputs, TensorLists& inputs,
                                                     const c10d::ScatterOptions& options) {
  return exact(OpType::SCATTER, bytes_of(inputs), outputs,
               [&] { return inner_->scatter(outputs, inputs, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::reduce_scatter(
    Tensors& outputs, TensorLists& inputs, const c10d::ReduceScatterOptions& options) {
  return exact(
      OpType::REDUCE_SCATTER, bytes_of(inputs), outputs,
      [&] { return inner_->reduce_scatter(outputs, inputs, summing(options)); },
      division(options.reduceOp, outputs));
}

c10::intrusive_ptr<Work> ProcessGroupDistro::_reduce_scatter_base(
    at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) {
  return exact(
      OpType::_REDUCE_SCATTER_BASE, input.nbytes(), {output},
      [&] { return inner_->_reduce_scatter_base(output, input, summing(options)); },
      division(options.reduceOp, {output}));
}

c10::intrusive_ptr<Work> ProcessGroupDistro::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) {
  return exact(
      OpType::REDUCE_SCATTER_TENSOR_COALESCED, bytes_of(inputs), outputs,
      [&] { return inner_->reduce_scatter_tensor_coalesced(outputs, inputs, summing(options)); },
      division(options.reduceOp, outputs));
}

c10::intrusive_ptr<Work> ProcessGroupDistro::alltoall_base(at::Tensor& output, at::Tensor& input,
                                                           std::vector<int64_t>& output_splits,
                                                           std::vector<int64_t>& input_splits,
                                                           const c10d::AllToAllOptions& options) {
  return exact(OpType::ALLTOALL_BASE, input.nbytes(), {output}, [&] {
    return inner_->alltoall_base(output, input, output_splits, input_splits, options);
  });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::alltoall(Tensors& outputs, Tensors& inputs,
                                                      const c10d::AllToAllOptions& options) {
  return exact(OpType::ALLTOALL, bytes_of(inputs), outputs,
               [&] { return inner_->alltoall(outputs, inputs, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::send(Tensors& tensors, int destination, int tag) {
  return exact(OpType::SEND, bytes_of(tensors), tensors,
               [&] { return inner_->send(tensors, destination, tag); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::recv(Tensors& tensors, int source, int tag) {
  return exact(OpType::RECV, 0, tensors, [&] { return inner_->recv(tensors, source, tag); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::recvAnysource(Tensors& tensors, int tag) {
  return exact(OpType::RECVANYSOURCE, 0, tensors,
               [&] { return inner_->recvAnysource(tensors, tag); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::barrier(const c10d::BarrierOptions& options) {
  return exact(OpType::BARRIER, 0, Tensors{}, [&] { return inner_->barrier(options); });
}

void ProcessGroupDistro::monitoredBarrier(const c10d::BarrierOptions& options,
                                          bool wait_all_ranks) {
  // Its own errors name the ranks that did not come.
  inner_->monitoredBarrier(options, wait_all_ranks);
}

void ProcessGroupDistro::setSequenceNumberForGroup() { inner_->setSequenceNumberForGroup(); }

uint64_t ProcessGroupDistro::getSequenceNumberForGroup() {
  return inner_->getSequenceNumberForGroup();
}

void ProcessGroupDistro::setTimeout(std::chrono::milliseconds timeout) {
  inner_->setTimeout(timeout);
}

void ProcessGroupDistro::shutdown() {
  const WithoutPythonLock without_lock;
  group_->close();
}

void ProcessGroupDistro::abort() {
  group_->abort(getRank(), fmt::format("rank {} has aborted its process group", getRank()));
  inner_->abort();
}

}  // namespace distro::c10d_backend
