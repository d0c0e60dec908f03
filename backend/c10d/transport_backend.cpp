#include "backend/c10d/transport_backend.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <torch/csrc/distributed/c10d/exception.h>
#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <utility>

#include "backend/c10d/sparse_bytes.h"
#include "backend/c10d/transfer_work.h"
#include "backend/exchange/error.h"
#include "backend/exchange/rendezvous.h"

namespace distro::c10d_backend {

using c10d::OpType;
using exchange::Collective;
using exchange::Combiner;
using exchange::ElementType;
using exchange::TransferOperation;

namespace {

using Tensors = TransportBackend::Tensors;

ElementType element_type(at::ScalarType type) {
  switch (type) {
    case at::kBool:
      return ElementType::boolean;
    case at::kByte:
      return ElementType::u8;
    case at::kChar:
      return ElementType::i8;
    case at::kUInt16:
      return ElementType::u16;
    case at::kShort:
      return ElementType::i16;
    case at::kUInt32:
      return ElementType::u32;
    case at::kInt:
      return ElementType::i32;
    case at::kUInt64:
      return ElementType::u64;
    case at::kLong:
      return ElementType::i64;
    case at::kHalf:
      return ElementType::f16;
    case at::kBFloat16:
      return ElementType::bf16;
    case at::kFloat:
      return ElementType::f32;
    case at::kDouble:
      return ElementType::f64;
    case at::kComplexFloat:
      return ElementType::c64;
    case at::kComplexDouble:
      return ElementType::c128;
    default:
      return ElementType::opaque;  // moved, but not reduced
  }
}

Combiner combiner(const c10d::ReduceOp& op, at::ScalarType type) {
  const auto known = [&] {
    switch (op) {
      case c10d::ReduceOp::SUM:
        return Combiner::sum;
      case c10d::ReduceOp::PRODUCT:
        return Combiner::product;
      case c10d::ReduceOp::MIN:
        return Combiner::min;
      case c10d::ReduceOp::MAX:
        return Combiner::max;
      case c10d::ReduceOp::BAND:
        return Combiner::bit_and;
      case c10d::ReduceOp::BOR:
        return Combiner::bit_or;
      case c10d::ReduceOp::BXOR:
        return Combiner::bit_xor;
      default:
        return Combiner::none;
    }
  }();
  // As Gloo's own: a RuntimeError.
  TORCH_CHECK(exchange::can_combine(element_type(type), known), "tensors of ", type,
              " cannot be reduced with ",
              known == Combiner::none ? "this operator" : exchange::name_of(known));
  return known;
}

void check_dense(const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.is_cpu() && tensor.layout() == at::kStrided,
                   "expected a dense tensor in host memory, not one that is ", tensor.layout(),
                   " on ", tensor.device());
}

std::span<const std::byte> bytes_of_tensor(const at::Tensor& contiguous) {
  return {static_cast<const std::byte*>(contiguous.const_data_ptr()), contiguous.nbytes()};
}

std::byte* memory_of_tensor(const at::Tensor& contiguous) {
  return static_cast<std::byte*>(contiguous.mutable_data_ptr());
}

// As many as make up the bytes: of opaque types the bytes themselves.
std::uint64_t elements_of(const at::Tensor& tensor) {
  return static_cast<std::uint64_t>(element_type(tensor.scalar_type()) == ElementType::opaque
                                        ? static_cast<std::int64_t>(tensor.nbytes())
                                        : tensor.numel());
}

void check_one(const Tensors& tensors, const char* what) {
  TORCH_CHECK_VALUE(tensors.size() == 1, what, " takes one tensor, and got ", tensors.size());
}

}  // namespace

class TransportBackend::Call : public std::enable_shared_from_this<Call> {
 public:
  Call(int rank, OpType operation, Tensors outputs)
      : work(c10::make_intrusive<TransferWork>(rank, operation, std::move(outputs))) {}

  // The tensor's values in order: itself, or a copy.
  at::Tensor read(const at::Tensor& tensor) {
    check_dense(tensor);
    const at::NoGradGuard no_grad;
    return keep_.emplace_back(tensor.contiguous());
  }

  // Where the results for a tensor are to go: itself, or a stand-in that is copied in the end.
  at::Tensor write(const at::Tensor& tensor) {
    check_dense(tensor);
    if (tensor.is_contiguous()) {
      return keep_.emplace_back(tensor);
    }
    const at::NoGradGuard no_grad;
    at::Tensor stand_in = tensor.contiguous();
    last_acts_.emplace_back([tensor, stand_in]() mutable { tensor.copy_(stand_in); });
    return keep_.emplace_back(std::move(stand_in));
  }

  void at_end(std::function<void()> act) { last_acts_.push_back(std::move(act)); }

  // One of the collectives has ended. After the last one, on the thread that it ended on.
  void end(const std::exception_ptr& error) {
    {
      const std::lock_guard lock(mutex_);
      error_ = error_ ? error_ : error;
      if (--pending_ > 0) {
        return;
      }
    }
    if (!error_) {
      try {
        // Another thread than the caller's, who may be in inference mode; ordinary tensors allow
        // it too.
        const c10::InferenceMode no_autograd;
        for (const auto& act : last_acts_) {
          act();
        }
      } catch (...) {
        error_ = std::current_exception();
      }
    }
    last_acts_.clear();
    keep_.clear();
    work->complete(error_);
  }

  // How often end() will be called. Before anything begins.
  void expect(std::size_t ends) {
    const std::lock_guard lock(mutex_);
    pending_ = ends;
  }

  const c10::intrusive_ptr<TransferWork> work;
  std::vector<Collective> collectives;

 private:
  Tensors keep_;
  std::vector<std::function<void()>> last_acts_;
  std::mutex mutex_;
  std::size_t pending_ = 0;   // guarded by mutex_
  std::exception_ptr error_;  // guarded by mutex_ until nothing is pending
};

TransportBackend::TransportBackend(std::shared_ptr<exchange::Group> group,
                                   std::chrono::milliseconds timeout, std::uint32_t stream,
                                   std::vector<int> members)
    : Backend(static_cast<int>(std::ranges::find(members, group->rank()) - members.begin()),
              static_cast<int>(members.size())),
      group_(std::move(group)),
      stream_(stream),
      members_(std::move(members)),
      timeout_(timeout) {
  TORCH_CHECK_VALUE(rank_ < size_ && stream < kMonitorStreams, "rank ", group_->rank(),
                    " is no member, or stream ", stream, " is not free");
  TORCH_CHECK_VALUE(size_ == 1 || group_->transfers() != nullptr,
                    "this group has no transport for exact collectives");
  if (size_ > 1) {
    group_->transfers()->open(stream_, members_);
  }
}

std::vector<int> TransportBackend::others() const {
  std::vector<int> ranks;
  std::ranges::copy_if(members_, std::back_inserter(ranks),
                       [&](int rank) { return rank != member(rank_); });
  return ranks;
}

std::chrono::milliseconds TransportBackend::timeout(std::chrono::milliseconds given) const {
  return given.count() > 0 ? given : timeout_.load();
}

void TransportBackend::check_rank(std::int64_t rank, const char* what) const {
  TORCH_CHECK_VALUE(rank >= 0 && rank < size_, what, " is rank ", rank, " in a group of ", size_);
}

TransportBackend::Work TransportBackend::begin(const std::shared_ptr<Call>& call,
                                               std::chrono::milliseconds timeout) {
  ++sequence_;
  auto collectives = std::move(call->collectives);
  call->expect(collectives.size() + 1);  // one for the issuing
  for (auto& collective : collectives) {
    if (size_ == 1) {
      if (const auto& reduction = collective.reduction; reduction && !reduction->own.empty()) {
        std::memmove(reduction->result, reduction->own.data(), reduction->own.size());
      }
      call->end(nullptr);
      continue;
    }
    collective.stream = stream_;
    collective.timeout = timeout;
    collective.done = [call](const std::exception_ptr& error) { call->end(error); };
    try {
      group_->transfers()->issue(std::move(collective));
    } catch (...) {
      call->end(std::current_exception());
    }
  }
  call->end(nullptr);
  return call->work;
}

TransportBackend::Work TransportBackend::broadcast(Tensors& tensors,
                                                   const c10d::BroadcastOptions& options) {
  check_rank(options.rootRank, "the root");
  const auto call = std::make_shared<Call>(rank_, OpType::BROADCAST, tensors);
  const int root = member(static_cast<int>(options.rootRank));
  for (const auto& tensor : tensors) {
    Collective& one = call->collectives.emplace_back();
    one.what = {.operation = TransferOperation::broadcast,
                .type = element_type(tensor.scalar_type()),
                .root = static_cast<std::uint32_t>(root),
                .elements = elements_of(tensor)};
    if (options.rootRank == rank_) {
      one.outgoing.push_back({bytes_of_tensor(call->read(tensor)), others()});
    } else {
      const at::Tensor target = call->write(tensor);
      one.incoming.push_back(
          {.from = root, .bytes = target.nbytes(), .into = memory_of_tensor(target)});
    }
  }
  return begin(call, timeout(options.timeout));
}

// The ranks' `inputs` by rank, of which each rank gets and reduces its own; or one, which all get.
void TransportBackend::add_reduction(Call& call, at::Tensor& result, const Tensors& inputs,
                                     const c10d::ReduceOp& op, TransferOperation operation) const {
  const bool scattered = operation == TransferOperation::reduce_scatter;
  const at::Tensor own = call.read(inputs[scattered ? static_cast<std::size_t>(rank_) : 0]);
  TORCH_CHECK_VALUE(own.numel() == result.numel() && own.scalar_type() == result.scalar_type(),
                    "expected as many elements of the same type in the result as in an input, not ",
                    result.numel(), " of ", result.scalar_type(), " and ", own.numel(), " of ",
                    own.scalar_type());
  const at::Tensor target = call.write(result);
  Collective& one = call.collectives.emplace_back();
  one.what = {.operation = operation,
              .type = element_type(own.scalar_type()),
              .combiner = combiner(op, own.scalar_type())};
  for (const auto& input : inputs) {
    one.what.elements += elements_of(input);
  }
  if (scattered) {
    for (int rank = 0; rank < size_; ++rank) {
      if (rank != rank_) {
        one.outgoing.push_back(
            {bytes_of_tensor(call.read(inputs[static_cast<std::size_t>(rank)])), {member(rank)}});
      }
    }
  } else {
    one.outgoing.push_back({bytes_of_tensor(own), others()});
  }
  for (const int peer : others()) {
    one.incoming.push_back({.from = peer, .bytes = own.nbytes()});
  }
  one.reduction = {bytes_of_tensor(own), memory_of_tensor(target)};
}

void TransportBackend::add_sparse(Call& call, at::Tensor& tensor) const {
  const auto own = std::make_shared<const transport::Bytes>(sparse_bytes(tensor));
  const auto received = std::make_shared<std::vector<transport::Bytes>>(members_.size());
  Collective& one = call.collectives.emplace_back();
  one.what = {.operation = TransferOperation::sparse_all_reduce,
              .type = element_type(tensor.scalar_type()),
              .combiner = Combiner::sum,
              .elements = static_cast<std::uint64_t>(tensor.numel())};
  one.outgoing.push_back({*own, others()});
  for (std::size_t rank = 0; rank < members_.size(); ++rank) {
    if (static_cast<int>(rank) != rank_) {
      one.incoming.push_back({.from = members_[rank],
                              .bytes = most_sparse_bytes(tensor),
                              .growing = &(*received)[rank]});
    }
  }
  call.at_end([tensor, own, received, rank = static_cast<std::size_t>(rank_),
               members = members_]() mutable {
    at::Tensor sum;
    for (std::size_t i = 0; i < received->size(); ++i) {
      try {
        const at::Tensor part = sparse_tensor(i == rank ? *own : (*received)[i], tensor);
        sum = sum.defined() ? sum.add(part) : part;
      } catch (const c10::Error& error) {
        throw exchange::Misbehaviour(
            members[i], fmt::format("rank {} sent what is no sparse tensor like this rank's: {}",
                                    members[i], error.what_without_backtrace()));
      }
    }
    tensor.copy_(sum.coalesce());
  });
}

TransportBackend::Work TransportBackend::allreduce(Tensors& tensors,
                                                   const c10d::AllreduceOptions& options) {
  const auto call = std::make_shared<Call>(rank_, OpType::ALLREDUCE, tensors);
  for (auto& tensor : tensors) {
    if (tensor.layout() == at::kSparse) {
      TORCH_CHECK_TYPE(options.reduceOp == c10d::ReduceOp::SUM,
                       "sparse tensors are reduced with SUM only");
      add_sparse(*call, tensor);
    } else {
      add_reduction(*call, tensor, {tensor}, options.reduceOp, TransferOperation::all_reduce);
    }
  }
  return begin(call, timeout(options.timeout));
}

TransportBackend::Work TransportBackend::allreduce_sparse(Tensors& tensors,
                                                          const c10d::AllreduceOptions& options) {
  return allreduce(tensors, options);
}

TransportBackend::Work TransportBackend::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  TORCH_CHECK_VALUE(!tensors.empty(), "all_reduce_coalesced needs a tensor");
  return allreduce(tensors, options);
}

TransportBackend::Work TransportBackend::reduce(Tensors& tensors,
                                                const c10d::ReduceOptions& options) {
  check_rank(options.rootRank, "the root");
  const auto call = std::make_shared<Call>(rank_, OpType::REDUCE, tensors);
  const int root = member(static_cast<int>(options.rootRank));
  for (const auto& tensor : tensors) {
    const bool here = options.rootRank == rank_;
    const at::Tensor own = here ? call->write(tensor) : call->read(tensor);
    Collective& one = call->collectives.emplace_back();
    one.what = {.operation = TransferOperation::reduce,
                .type = element_type(own.scalar_type()),
                .combiner = combiner(options.reduceOp, own.scalar_type()),
                .root = static_cast<std::uint32_t>(root),
                .elements = elements_of(own)};
    if (!here) {
      one.outgoing.push_back({bytes_of_tensor(own), {root}});
      continue;
    }
    for (const int peer : others()) {
      one.incoming.push_back({.from = peer, .bytes = own.nbytes()});
    }
    one.reduction = {bytes_of_tensor(own), memory_of_tensor(own)};
  }
  return begin(call, timeout(options.timeout));
}

// The ranks' inputs into `outputs`, by rank.
void TransportBackend::add_gather(Call& call, const Tensors& outputs,
                                  const at::Tensor& input) const {
  TORCH_CHECK_VALUE(outputs.size() == members_.size(), "expected an output for each of the ", size_,
                    " ranks, and got ", outputs.size());
  const at::Tensor own = call.read(input);
  Collective one;
  one.what = {.operation = TransferOperation::all_gather,
              .type = element_type(own.scalar_type()),
              .elements = elements_of(own)};
  one.outgoing.push_back({bytes_of_tensor(own), others()});
  for (int rank = 0; rank < size_; ++rank) {
    const at::Tensor& output = outputs[static_cast<std::size_t>(rank)];
    TORCH_CHECK_TYPE(output.scalar_type() == own.scalar_type(), "expected outputs of ",
                     own.scalar_type(), ", and got ", output.scalar_type());
    if (output.numel() != own.numel()) {
      one.what.elements = 0;  // each rank has its own number
    }
    if (rank == rank_) {
      TORCH_CHECK_VALUE(output.numel() == own.numel(), "expected an output of ", own.numel(),
                        " elements for this rank's own, and got one of ", output.numel());
      call.at_end([output, own]() mutable { output.copy_(own.view(output.sizes())); });
      continue;
    }
    const at::Tensor target = call.write(output);
    one.incoming.push_back(
        {.from = member(rank), .bytes = target.nbytes(), .into = memory_of_tensor(target)});
  }
  call.collectives.push_back(std::move(one));
}

TransportBackend::Work TransportBackend::allgather(TensorLists& outputs, Tensors& inputs,
                                                   const c10d::AllgatherOptions& options) {
  TORCH_CHECK_VALUE(!inputs.empty() && outputs.size() == inputs.size(),
                    "expected a list of outputs for each input, and got ", outputs.size(), " for ",
                    inputs.size());
  Tensors all;
  for (const auto& list : outputs) {
    all.insert(all.end(), list.begin(), list.end());
  }
  const auto call = std::make_shared<Call>(rank_, OpType::ALLGATHER, std::move(all));
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    add_gather(*call, outputs[i], inputs[i]);
  }
  return begin(call, timeout(options.timeout));
}

namespace {

// `ranks` equal parts of a tensor, flat. The tensor is contiguous.
Tensors parts_of(const at::Tensor& tensor, int ranks) {
  TORCH_CHECK_VALUE(tensor.numel() % ranks == 0, "expected a tensor that ", ranks,
                    " ranks can share, and got one of ", tensor.numel(), " elements");
  Tensors parts;
  const at::Tensor flat = tensor.detach().view({-1});
  const std::int64_t size = tensor.numel() / ranks;
  for (int rank = 0; rank < ranks; ++rank) {
    parts.push_back(flat.narrow(0, rank * size, size));
  }
  return parts;
}

}  // namespace

TransportBackend::Work TransportBackend::_allgather_base(at::Tensor& output, at::Tensor& input,
                                                         const c10d::AllgatherOptions& options) {
  Tensors outputs = {output};
  Tensors inputs = {input};
  return allgather_into_tensor_coalesced(outputs, inputs, options);
}

TransportBackend::Work TransportBackend::allgather_coalesced(
    TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  TORCH_CHECK_VALUE(outputs.size() == members_.size(),
                    "expected a list of outputs for each of the ", size_, " ranks, and got ",
                    outputs.size());
  Tensors all;
  for (const auto& list : outputs) {
    TORCH_CHECK_VALUE(list.size() == inputs.size(), "expected an output for each of the ",
                      inputs.size(), " inputs, and got ", list.size());
    all.insert(all.end(), list.begin(), list.end());
  }
  const auto call = std::make_shared<Call>(rank_, OpType::ALLGATHER_COALESCED, std::move(all));
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    Tensors of_input;
    for (const auto& list : outputs) {
      of_input.push_back(list[i]);
    }
    add_gather(*call, of_input, inputs[i]);
  }
  return begin(call, timeout(options.timeout));
}

TransportBackend::Work TransportBackend::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  TORCH_CHECK_VALUE(outputs.size() == inputs.size(), "expected an output for each of the ",
                    inputs.size(), " inputs, and got ", outputs.size());
  const auto call = std::make_shared<Call>(rank_, OpType::_ALLGATHER_BASE, outputs);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    TORCH_CHECK_VALUE(outputs[i].numel() == inputs[i].numel() * size_,
                      "expected an output of as many elements as all ranks' inputs, ",
                      inputs[i].numel() * size_, ", and got one of ", outputs[i].numel());
    add_gather(*call, parts_of(call->write(outputs[i]), size_), inputs[i]);
  }
  return begin(call, timeout(options.timeout));
}

TransportBackend::Work TransportBackend::gather(TensorLists& outputs, Tensors& inputs,
                                                const c10d::GatherOptions& options) {
  check_rank(options.rootRank, "the root");
  check_one(inputs, "gather");
  const bool here = options.rootRank == rank_;
  TORCH_CHECK_VALUE(
      here ? outputs.size() == 1 && outputs[0].size() == members_.size() : outputs.empty(),
      "the root, and no other rank, gives gather a list of an output for each rank");
  const int root = member(static_cast<int>(options.rootRank));
  const auto call = std::make_shared<Call>(rank_, OpType::GATHER, here ? outputs[0] : Tensors{});
  const at::Tensor own = call->read(inputs[0]);
  Collective one;
  one.what = {.operation = TransferOperation::gather,
              .type = element_type(own.scalar_type()),
              .root = static_cast<std::uint32_t>(root),
              .elements = elements_of(own)};
  if (here) {
    for (int rank = 0; rank < size_; ++rank) {
      const at::Tensor& output = outputs[0][static_cast<std::size_t>(rank)];
      TORCH_CHECK_VALUE(output.numel() == own.numel() && output.scalar_type() == own.scalar_type(),
                        "expected outputs of ", own.numel(), " elements of ", own.scalar_type(),
                        ", and got one of ", output.numel(), " of ", output.scalar_type());
      if (rank == rank_) {
        call->at_end([output, own]() mutable { output.copy_(own.view(output.sizes())); });
        continue;
      }
      const at::Tensor target = call->write(output);
      one.incoming.push_back(
          {.from = member(rank), .bytes = target.nbytes(), .into = memory_of_tensor(target)});
    }
  } else {
    one.outgoing.push_back({bytes_of_tensor(own), {root}});
  }
  call->collectives.push_back(std::move(one));
  return begin(call, timeout(options.timeout));
}

TransportBackend::Work TransportBackend::scatter(Tensors& outputs, TensorLists& inputs,
                                                 const c10d::ScatterOptions& options) {
  check_rank(options.rootRank, "the root");
  check_one(outputs, "scatter");
  const bool here = options.rootRank == rank_;
  TORCH_CHECK_VALUE(
      here ? inputs.size() == 1 && inputs[0].size() == members_.size() : inputs.empty(),
      "the root, and no other rank, gives scatter a list of an input for each rank");
  const int root = member(static_cast<int>(options.rootRank));
  const at::Tensor output = outputs[0];
  const auto call = std::make_shared<Call>(rank_, OpType::SCATTER, outputs);
  Collective one;
  one.what = {.operation = TransferOperation::scatter,
              .type = element_type(output.scalar_type()),
              .root = static_cast<std::uint32_t>(root),
              .elements = elements_of(output)};
  if (here) {
    for (int rank = 0; rank < size_; ++rank) {
      const at::Tensor& input = inputs[0][static_cast<std::size_t>(rank)];
      TORCH_CHECK_VALUE(
          input.numel() == output.numel() && input.scalar_type() == output.scalar_type(),
          "expected inputs of ", output.numel(), " elements of ", output.scalar_type(),
          ", and got one of ", input.numel(), " of ", input.scalar_type());
      const at::Tensor from = call->read(input);
      if (rank == rank_) {
        call->at_end([output, from]() mutable { output.copy_(from.view(output.sizes())); });
      } else {
        one.outgoing.push_back({bytes_of_tensor(from), {member(rank)}});
      }
    }
  } else {
    const at::Tensor target = call->write(output);
    one.incoming.push_back(
        {.from = root, .bytes = target.nbytes(), .into = memory_of_tensor(target)});
  }
  call->collectives.push_back(std::move(one));
  return begin(call, timeout(options.timeout));
}

TransportBackend::Work TransportBackend::reduce_scatter(Tensors& outputs, TensorLists& inputs,
                                                        const c10d::ReduceScatterOptions& options) {
  TORCH_CHECK_VALUE(outputs.size() == inputs.size(), "expected a list of inputs for each of the ",
                    outputs.size(), " outputs, and got ", inputs.size());
  const auto call = std::make_shared<Call>(rank_, OpType::REDUCE_SCATTER, outputs);
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    TORCH_CHECK_VALUE(inputs[i].size() == members_.size(), "expected an input for each of the ",
                      size_, " ranks, and got ", inputs[i].size());
    add_reduction(*call, outputs[i], inputs[i], options.reduceOp,
                  TransferOperation::reduce_scatter);
  }
  return begin(call, timeout(options.timeout));
}

TransportBackend::Work TransportBackend::_reduce_scatter_base(
    at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) {
  Tensors outputs = {output};
  Tensors inputs = {input};
  return reduce_scatter_tensor_coalesced(outputs, inputs, options);
}

TransportBackend::Work TransportBackend::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) {
  TORCH_CHECK_VALUE(outputs.size() == inputs.size(), "expected an output for each of the ",
                    inputs.size(), " inputs, and got ", outputs.size());
  const auto call = std::make_shared<Call>(rank_, OpType::_REDUCE_SCATTER_BASE, outputs);
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    add_reduction(*call, outputs[i], parts_of(call->read(inputs[i]), size_), options.reduceOp,
                  TransferOperation::reduce_scatter);
  }
  return begin(call, timeout(options.timeout));
}

TransportBackend::Work TransportBackend::alltoall_base(at::Tensor& output, at::Tensor& input,
                                                       Splits& output_splits, Splits& input_splits,
                                                       const c10d::AllToAllOptions& options) {
  const auto call = std::make_shared<Call>(rank_, OpType::ALLTOALL_BASE, Tensors{output});
  TORCH_CHECK_TYPE(output.scalar_type() == input.scalar_type(),
                   "all_to_all needs tensors of one type, and got ", output.scalar_type(), " and ",
                   input.scalar_type());
  // Rows for each rank, or equal parts.
  const auto split = [&](const at::Tensor& tensor, const Splits& rows) {
    if (rows.empty()) {
      return parts_of(tensor, size_);
    }
    TORCH_CHECK_VALUE(
        rows.size() == members_.size() && tensor.dim() > 0 &&
            std::ranges::all_of(rows, [](auto count) { return count >= 0; }) &&
            std::accumulate(rows.begin(), rows.end(), std::int64_t{0}) == tensor.size(0),
        "the splits of all_to_all are rows for each of the ", size_,
        " ranks, together those of the tensor");
    return tensor.detach().split_with_sizes(rows);
  };
  const bool in_place = output.is_alias_of(input);
  const Tensors from =
      split(in_place ? call->read(input.clone()) : call->read(input), input_splits);
  const Tensors to = split(call->write(output), output_splits);
  Collective one;
  one.what = {.operation = TransferOperation::all_to_all,
              .type = element_type(input.scalar_type()),
              .elements = input_splits.empty() && output_splits.empty() ? elements_of(input) : 0};
  for (int rank = 0; rank < size_; ++rank) {
    const auto index = static_cast<std::size_t>(rank);
    if (rank == rank_) {
      TORCH_CHECK_VALUE(from[index].numel() == to[index].numel(),
                        "expected what this rank sends to itself, ", from[index].numel(),
                        " elements, to be what it receives of itself, ", to[index].numel());
      call->at_end([source = from[index], target = to[index]]() mutable {
        target.copy_(source.view(target.sizes()));
      });
      continue;
    }
    one.outgoing.push_back({bytes_of_tensor(from[index]), {member(rank)}});
    one.incoming.push_back(
        {.from = member(rank), .bytes = to[index].nbytes(), .into = memory_of_tensor(to[index])});
  }
  call->collectives.push_back(std::move(one));
  return begin(call, timeout(options.timeout));
}

TransportBackend::Work TransportBackend::alltoall(Tensors& outputs, Tensors& inputs,
                                                  const c10d::AllToAllOptions& options) {
  TORCH_CHECK_VALUE(inputs.size() == members_.size() && outputs.size() == members_.size(),
                    "all_to_all needs an input and an output for each of the ", size_,
                    " ranks, and got ", inputs.size(), " and ", outputs.size());
  const auto call = std::make_shared<Call>(rank_, OpType::ALLTOALL, outputs);
  Collective one;
  one.what = {.operation = TransferOperation::all_to_all,
              .type = element_type(inputs.front().scalar_type())};
  for (int rank = 0; rank < size_; ++rank) {
    const auto index = static_cast<std::size_t>(rank);
    const at::Tensor source = call->read(inputs[index]);
    if (rank == rank_) {
      call->at_end([source, target = outputs[index]]() mutable {
        target.copy_(source.view(target.sizes()));
      });
      continue;
    }
    const at::Tensor target = call->write(outputs[index]);
    one.outgoing.push_back({bytes_of_tensor(source), {member(rank)}});
    one.incoming.push_back(
        {.from = member(rank), .bytes = target.nbytes(), .into = memory_of_tensor(target)});
  }
  call->collectives.push_back(std::move(one));
  return begin(call, timeout(options.timeout));
}

TransportBackend::Work TransportBackend::send(Tensors& tensors, int destination, int tag) {
  check_one(tensors, "send");
  check_rank(destination, "the receiver");
  TORCH_CHECK_VALUE(destination != rank_, "a rank cannot send to itself");
  const auto call = std::make_shared<Call>(rank_, OpType::SEND, Tensors{});
  const at::Tensor source = call->read(tensors[0]);
  call->expect(1);
  group_->transfers()->send(
      {.to = member(destination),
       .stream = stream_,
       .tag = static_cast<std::uint32_t>(tag),
       .bytes = bytes_of_tensor(source),
       .timeout = timeout_,
       .done = [call, source](const std::exception_ptr& error) { call->end(error); }});
  return call->work;
}

TransportBackend::Work TransportBackend::receive(Tensors& tensors, std::optional<int> source,
                                                 int tag) {
  check_one(tensors, "recv");
  const auto call =
      std::make_shared<Call>(rank_, source ? OpType::RECV : OpType::RECVANYSOURCE, tensors);
  const at::Tensor target = call->write(tensors[0]);
  call->expect(1);
  TORCH_CHECK_VALUE(size_ > 1, "a group of one rank has nobody to receive from");
  group_->transfers()->want(
      {.from = source ? std::optional(member(*source)) : std::nullopt,
       .stream = stream_,
       .tag = static_cast<std::uint32_t>(tag),
       .into = {memory_of_tensor(target), target.nbytes()},
       .timeout = timeout_,
       .done = [call, target, members = members_](int from, const std::exception_ptr& error) {
         const auto found = std::ranges::find(members, from);
         call->work->set_source(found == members.end() ? -1
                                                       : static_cast<int>(found - members.begin()));
         call->end(error);
       }});
  return call->work;
}

TransportBackend::Work TransportBackend::recv(Tensors& tensors, int source, int tag) {
  check_rank(source, "the sender");
  TORCH_CHECK_VALUE(source != rank_, "a rank cannot receive from itself");
  return receive(tensors, source, tag);
}

TransportBackend::Work TransportBackend::recvAnysource(Tensors& tensors, int tag) {
  return receive(tensors, std::nullopt, tag);
}

TransportBackend::Work TransportBackend::barrier(const c10d::BarrierOptions& options) {
  const auto call = std::make_shared<Call>(rank_, OpType::BARRIER, Tensors{});
  call->collectives.emplace_back();
  return begin(call, timeout(options.timeout));
}

void TransportBackend::abort() {
  if (size_ > 1) {
    group_->transfers()->fail(std::make_exception_ptr(exchange::Interrupted(
        fmt::format("rank {} has aborted its process group", group_->rank()))));
  }
}

}  // namespace distro::c10d_backend
