#include <ATen/ATen.h>

#include <utility>

#include "backend/c10d/exact_collectives.h"
#include "backend/c10d/process_group_distro.h"
#include "backend/c10d/reduction.h"

// The collectives of ProcessGroupDistro: each hands its tensors to the inner backend by way of
// exact().

namespace distro::c10d_backend {
namespace {

using c10d::OpType;
using c10d::Work;
using Tensors = std::vector<at::Tensor>;
using TensorLists = std::vector<std::vector<at::Tensor>>;

Tensors flat(const TensorLists& lists) {
  Tensors tensors;
  for (const auto& list : lists) {
    tensors.insert(tensors.end(), list.begin(), list.end());
  }
  return tensors;
}

std::vector<std::int64_t> elements(const Tensors& tensors) {
  std::vector<std::int64_t> sizes;
  for (const auto& tensor : tensors) {
    sizes.push_back(tensor.numel());
  }
  return sizes;
}

// One flat tensor with the elements of all.
at::Tensor joined(const Tensors& tensors) {
  const at::NoGradGuard no_grad;
  Tensors parts;
  for (const auto& tensor : tensors) {
    parts.push_back(tensor.detach().reshape({-1}));
  }
  return at::cat(parts);
}

// torch 2.11 has no operation types for these two and files them under COALESCED.
template <typename Type>
constexpr Type allgather_into_tensor_coalesced_type() {
  if constexpr (requires { Type::ALLGATHER_INTO_TENSOR_COALESCED; }) {
    return Type::ALLGATHER_INTO_TENSOR_COALESCED;
  } else {
    return Type::COALESCED;
  }
}

template <typename Type>
constexpr Type reduce_scatter_tensor_coalesced_type() {
  if constexpr (requires { Type::REDUCE_SCATTER_TENSOR_COALESCED; }) {
    return Type::REDUCE_SCATTER_TENSOR_COALESCED;
  } else {
    return Type::COALESCED;
  }
}

// The caller's options with the operator that the inner backend is to use.
template <typename Options>
Options with(const c10d::ReduceOp& op, Options options) {
  options.reduceOp = op;
  return options;
}

}  // namespace

c10::intrusive_ptr<Work> ProcessGroupDistro::broadcast(Tensors& tensors,
                                                       const c10d::BroadcastOptions& options) {
  return exact(OpType::BROADCAST, "distro:broadcast", tensors, tensors,
               [&] { return inner_->broadcast(tensors, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::allreduce(Tensors& tensors,
                                                       const c10d::AllreduceOptions& options) {
  if (gradients_ && gradients_->takes(tensors, options)) {
    return recorded(OpType::ALLREDUCE, "distro:all_reduce", tensors, tensors,
                    [&](const Operations::Ticket& ticket) {
                      return gradients_->allreduce(tensors, options, ticket);
                    });
  }
  const auto of_replicas = replicas();
  if (of_replicas && tensors.size() == 1 && of_replicas->take(tensors[0], options.reduceOp)) {
    return recorded(OpType::ALLREDUCE, "distro:all_reduce", tensors, tensors,
                    [&](const Operations::Ticket& ticket) {
                      if (site_) {
                        return exact_mean_in_site(tensors[0], group_, *site_, operations_, ticket);
                      }
                      operations_->finish(ticket);
                      return done(getRank(), OpType::ALLREDUCE, "distro:all_reduce", tensors);
                    });
  }
  const Reduction reduction(options.reduceOp, getSize());
  Tensors reduced = reduction.prepare(tensors);
  return exact(
      OpType::ALLREDUCE, "distro:all_reduce", tensors, tensors,
      [&] { return inner_->allreduce(reduced, with(reduction.inner_op(), options)); },
      reduction.conclude(reduced, tensors));
}

c10::intrusive_ptr<Work> ProcessGroupDistro::allreduce_sparse(
    Tensors& tensors, const c10d::AllreduceOptions& options) {
  return exact(OpType::_ALLREDUCE_SPARSE, "distro:sparse_all_reduce", tensors, tensors,
               [&] { return inner_->allreduce_sparse(tensors, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  const Reduction reduction(options.reduceOp, getSize());
  Tensors reduced = reduction.prepare(tensors);
  return exact(
      OpType::ALLREDUCE_COALESCED, "distro:all_reduce_coalesced", tensors, tensors,
      [&] { return inner_->allreduce_coalesced(reduced, with(reduction.inner_op(), options)); },
      reduction.conclude(reduced, tensors));
}

c10::intrusive_ptr<Work> ProcessGroupDistro::reduce(Tensors& tensors,
                                                    const c10d::ReduceOptions& options) {
  const Reduction reduction(options.reduceOp, getSize());
  Tensors reduced = reduction.prepare(tensors);
  return exact(
      OpType::REDUCE, "distro:reduce", tensors, tensors,
      [&] { return inner_->reduce(reduced, with(reduction.inner_op(), options)); },
      options.rootRank == getRank() ? reduction.conclude(reduced, tensors)
                                    : std::function<void()>{});
}

c10::intrusive_ptr<Work> ProcessGroupDistro::allgather(TensorLists& outputs, Tensors& inputs,
                                                       const c10d::AllgatherOptions& options) {
  return exact(OpType::ALLGATHER, "distro:all_gather", inputs, flat(outputs),
               [&] { return inner_->allgather(outputs, inputs, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::_allgather_base(
    at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) {
  return exact(OpType::_ALLGATHER_BASE, "distro:_all_gather_base", {input}, {output},
               [&] { return inner_->_allgather_base(output, input, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::allgather_coalesced(
    TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  return exact(OpType::ALLGATHER_COALESCED, "distro:all_gather_coalesced", inputs, flat(outputs),
               [&] { return inner_->allgather_coalesced(outputs, inputs, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  return exact(allgather_into_tensor_coalesced_type<OpType>(),
               "distro:all_gather_into_tensor_coalesced", inputs, outputs,
               [&] { return inner_->allgather_into_tensor_coalesced(outputs, inputs, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::gather(TensorLists& outputs, Tensors& inputs,
                                                    const c10d::GatherOptions& options) {
  return exact(OpType::GATHER, "distro:gather", inputs, flat(outputs),
               [&] { return inner_->gather(outputs, inputs, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::gather_into_tensor(
    at::Tensor& output, at::Tensor& input, const c10d::GatherOptions& options) {
  TensorLists parts;
  if (options.rootRank == getRank()) {
    TORCH_CHECK_VALUE(output.numel() == input.numel() * getSize() && output.is_contiguous(),
                      "the output of gather_into_tensor is to be contiguous and to hold ",
                      getSize(), " times the input's ", input.numel(), " elements, and holds ",
                      output.numel());
    auto sizes = input.sizes().vec();
    sizes.insert(sizes.begin(), getSize());
    parts.push_back(output.view(sizes).unbind());
  }
  Tensors inputs = {input};
  return gather(parts, inputs, options);
}

c10::intrusive_ptr<Work> ProcessGroupDistro::scatter(Tensors& outputs, TensorLists& inputs,
                                                     const c10d::ScatterOptions& options) {
  return exact(OpType::SCATTER, "distro:scatter", flat(inputs), outputs,
               [&] { return inner_->scatter(outputs, inputs, options); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::reduce_scatter(
    Tensors& outputs, TensorLists& inputs, const c10d::ReduceScatterOptions& options) {
  const Reduction reduction(options.reduceOp, getSize());
  TensorLists prepared;
  for (const auto& list : inputs) {
    prepared.push_back(reduction.prepare(list));
  }
  Tensors reduced = reduction.receive(outputs);
  return exact(
      OpType::REDUCE_SCATTER, "distro:reduce_scatter", flat(inputs), outputs,
      [&] {
        return inner_->reduce_scatter(reduced, prepared, with(reduction.inner_op(), options));
      },
      reduction.conclude(reduced, outputs));
}

c10::intrusive_ptr<Work> ProcessGroupDistro::_reduce_scatter_base(
    at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) {
  if (gradients_ && gradients_->takes(output, input, options)) {
    return recorded(OpType::_REDUCE_SCATTER_BASE, "distro:_reduce_scatter_base", {input}, {output},
                    [&](const Operations::Ticket& ticket) {
                      return gradients_->reduce_scatter(output, input, options, ticket);
                    });
  }
  const Reduction reduction(options.reduceOp, getSize());
  Tensors prepared = reduction.prepare({input});
  Tensors reduced = reduction.receive({output});
  return exact(
      OpType::_REDUCE_SCATTER_BASE, "distro:_reduce_scatter_base", {input}, {output},
      [&] {
        return inner_->_reduce_scatter_base(reduced[0], prepared[0],
                                            with(reduction.inner_op(), options));
      },
      reduction.conclude(reduced, {output}));
}

c10::intrusive_ptr<Work> ProcessGroupDistro::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) {
  const Reduction reduction(options.reduceOp, getSize());
  Tensors prepared = reduction.prepare(inputs);
  Tensors reduced = reduction.receive(outputs);
  return exact(
      reduce_scatter_tensor_coalesced_type<OpType>(), "distro:reduce_scatter_tensor_coalesced",
      inputs, outputs,
      [&] {
        return inner_->reduce_scatter_tensor_coalesced(reduced, prepared,
                                                       with(reduction.inner_op(), options));
      },
      reduction.conclude(reduced, outputs));
}

c10::intrusive_ptr<Work> ProcessGroupDistro::alltoall_base(at::Tensor& output, at::Tensor& input,
                                                           std::vector<int64_t>& output_splits,
                                                           std::vector<int64_t>& input_splits,
                                                           const c10d::AllToAllOptions& options) {
  return exact(OpType::ALLTOALL_BASE, "distro:all_to_all", {input}, {output}, [&] {
    return inner_->alltoall_base(output, input, output_splits, input_splits, options);
  });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::alltoall(Tensors& outputs, Tensors& inputs,
                                                      const c10d::AllToAllOptions& options) {
  TORCH_CHECK_VALUE(
      inputs.size() == static_cast<std::size_t>(getSize()) && inputs.size() == outputs.size(),
      "all_to_all needs one input and one output for each of the ", getSize(), " ranks, and got ",
      inputs.size(), " and ", outputs.size());
  if (!inputs.front().is_cpu()) {
    return exact(OpType::ALLTOALL, "distro:all_to_all", inputs, outputs,
                 [&] { return inner_->alltoall(outputs, inputs, options); });
  }
  // Gloo of older torches exchanges parts of one tensor only.
  for (const auto& tensor : flat({inputs, outputs})) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == inputs.front().scalar_type(),
                     "all_to_all needs tensors of one type, and got ", tensor.scalar_type(),
                     " and ", inputs.front().scalar_type());
  }
  at::Tensor sent = joined(inputs);
  at::Tensor received = joined(outputs);
  auto sizes_sent = elements(inputs);
  auto sizes_received = elements(outputs);
  return exact(
      OpType::ALLTOALL, "distro:all_to_all", inputs, outputs,
      [&] { return inner_->alltoall_base(received, sent, sizes_received, sizes_sent, options); },
      [received, sizes_received, outputs]() mutable {
        const c10::InferenceMode no_autograd;  // as in Reduction::conclude
        const auto parts = received.split_with_sizes(sizes_received);
        for (std::size_t i = 0; i < outputs.size(); ++i) {
          outputs[i].copy_(parts[i].view(outputs[i].sizes()));
        }
      });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::send(Tensors& tensors, int destination, int tag) {
  return exact(OpType::SEND, "distro:send", tensors, {},
               [&] { return inner_->send(tensors, destination, tag); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::recv(Tensors& tensors, int source, int tag) {
  return exact(OpType::RECV, "distro:recv", {}, tensors,
               [&] { return inner_->recv(tensors, source, tag); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::recvAnysource(Tensors& tensors, int tag) {
  return exact(OpType::RECVANYSOURCE, "distro:recvAnySource", {}, tensors,
               [&] { return inner_->recvAnysource(tensors, tag); });
}

c10::intrusive_ptr<Work> ProcessGroupDistro::barrier(const c10d::BarrierOptions& options) {
  return exact(OpType::BARRIER, "distro:barrier", {}, {}, [&] { return inner_->barrier(options); });
}

}  // namespace distro::c10d_backend
