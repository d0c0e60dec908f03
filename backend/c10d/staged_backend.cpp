#include "backend/c10d/staged_backend.h"

#include <utility>

#include "backend/c10d/staged_work.h"

namespace distro::c10d_backend {

using c10d::OpType;

namespace {

at::Device device_of(const StagedBackend::Tensors& tensors) {
  TORCH_CHECK_VALUE(!tensors.empty(), "a collective without a tensor");
  return tensors.front().device();
}

}  // namespace

StagedBackend::StagedBackend(SharedBackend host)
    : Backend(host->getRank(), host->getSize()), host_(std::move(host)) {}

StagedBackend::Work StagedBackend::run(OpType operation, at::Device device,
                                       const std::function<std::function<Work()>(Staging&)>& take) {
  Staging staging(device);
  const auto begin = take(staging);
  staging.ready();
  return StagedWork::make(begin(), operation, std::move(staging));
}

StagedBackend::Work StagedBackend::broadcast(Tensors& tensors,
                                             const c10d::BroadcastOptions& options) {
  return run(OpType::BROADCAST, device_of(tensors), [&](Staging& staging) {
    // Only the root's are read.
    Tensors hosts =
        options.rootRank == getRank() ? staging.in_place(tensors) : staging.outputs(tensors);
    return [this, hosts, options]() mutable { return host_->broadcast(hosts, options); };
  });
}

StagedBackend::Work StagedBackend::allreduce(Tensors& tensors,
                                             const c10d::AllreduceOptions& options) {
  return run(OpType::ALLREDUCE, device_of(tensors), [&](Staging& staging) {
    return [this, hosts = staging.in_place(tensors), options]() mutable {
      return host_->allreduce(hosts, options);
    };
  });
}

StagedBackend::Work StagedBackend::allreduce_sparse(Tensors& tensors,
                                                    const c10d::AllreduceOptions& options) {
  return run(OpType::_ALLREDUCE_SPARSE, device_of(tensors), [&](Staging& staging) {
    return [this, hosts = staging.in_place(tensors), options]() mutable {
      return host_->allreduce_sparse(hosts, options);
    };
  });
}

StagedBackend::Work StagedBackend::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  return run(OpType::ALLREDUCE_COALESCED, device_of(tensors), [&](Staging& staging) {
    return [this, hosts = staging.in_place(tensors), options]() mutable {
      return host_->allreduce_coalesced(hosts, options);
    };
  });
}

StagedBackend::Work StagedBackend::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  return run(OpType::REDUCE, device_of(tensors), [&](Staging& staging) {
    // Only the root's are written.
    Tensors hosts =
        options.rootRank == getRank() ? staging.in_place(tensors) : staging.inputs(tensors);
    return [this, hosts, options]() mutable { return host_->reduce(hosts, options); };
  });
}

StagedBackend::Work StagedBackend::allgather(TensorLists& outputs, Tensors& inputs,
                                             const c10d::AllgatherOptions& options) {
  return run(OpType::ALLGATHER, device_of(inputs), [&](Staging& staging) {
    TensorLists to;
    for (const auto& list : outputs) {
      to.push_back(staging.outputs(list));
    }
    return [this, to, from = staging.inputs(inputs), options]() mutable {
      return host_->allgather(to, from, options);
    };
  });
}

StagedBackend::Work StagedBackend::_allgather_base(at::Tensor& output, at::Tensor& input,
                                                   const c10d::AllgatherOptions& options) {
  return run(OpType::_ALLGATHER_BASE, input.device(), [&](Staging& staging) {
    return [this, to = staging.output(output), from = staging.input(input), options]() mutable {
      return host_->_allgather_base(to, from, options);
    };
  });
}

StagedBackend::Work StagedBackend::allgather_coalesced(TensorLists& outputs, Tensors& inputs,
                                                       const c10d::AllgatherOptions& options) {
  return run(OpType::ALLGATHER_COALESCED, device_of(inputs), [&](Staging& staging) {
    TensorLists to;
    for (const auto& list : outputs) {
      to.push_back(staging.outputs(list));
    }
    return [this, to, from = staging.inputs(inputs), options]() mutable {
      return host_->allgather_coalesced(to, from, options);
    };
  });
}

StagedBackend::Work StagedBackend::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  return run(OpType::COALESCED, device_of(inputs), [&](Staging& staging) {
    return [this, to = staging.outputs(outputs), from = staging.inputs(inputs), options]() mutable {
      return host_->allgather_into_tensor_coalesced(to, from, options);
    };
  });
}

StagedBackend::Work StagedBackend::gather(TensorLists& outputs, Tensors& inputs,
                                          const c10d::GatherOptions& options) {
  return run(OpType::GATHER, device_of(inputs), [&](Staging& staging) {
    TensorLists to;
    for (const auto& list : outputs) {
      to.push_back(staging.outputs(list));
    }
    return [this, to, from = staging.inputs(inputs), options]() mutable {
      return host_->gather(to, from, options);
    };
  });
}

StagedBackend::Work StagedBackend::scatter(Tensors& outputs, TensorLists& inputs,
                                           const c10d::ScatterOptions& options) {
  return run(OpType::SCATTER, device_of(outputs), [&](Staging& staging) {
    TensorLists from;
    for (const auto& list : inputs) {
      from.push_back(staging.inputs(list));
    }
    return [this, to = staging.outputs(outputs), from, options]() mutable {
      return host_->scatter(to, from, options);
    };
  });
}

StagedBackend::Work StagedBackend::reduce_scatter(Tensors& outputs, TensorLists& inputs,
                                                  const c10d::ReduceScatterOptions& options) {
  return run(OpType::REDUCE_SCATTER, device_of(outputs), [&](Staging& staging) {
    TensorLists from;
    for (const auto& list : inputs) {
      from.push_back(staging.inputs(list));
    }
    return [this, to = staging.outputs(outputs), from, options]() mutable {
      return host_->reduce_scatter(to, from, options);
    };
  });
}

StagedBackend::Work StagedBackend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                        const c10d::ReduceScatterOptions& options) {
  return run(OpType::_REDUCE_SCATTER_BASE, input.device(), [&](Staging& staging) {
    return [this, to = staging.output(output), from = staging.input(input), options]() mutable {
      return host_->_reduce_scatter_base(to, from, options);
    };
  });
}

StagedBackend::Work StagedBackend::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) {
  return run(OpType::COALESCED, device_of(inputs), [&](Staging& staging) {
    return [this, to = staging.outputs(outputs), from = staging.inputs(inputs), options]() mutable {
      return host_->reduce_scatter_tensor_coalesced(to, from, options);
    };
  });
}

StagedBackend::Work StagedBackend::alltoall_base(at::Tensor& output, at::Tensor& input,
                                                 Splits& output_splits, Splits& input_splits,
                                                 const c10d::AllToAllOptions& options) {
  return run(OpType::ALLTOALL_BASE, input.device(), [&](Staging& staging) {
    return [&, this, to = staging.output(output), from = staging.input(input)]() mutable {
      return host_->alltoall_base(to, from, output_splits, input_splits, options);
    };
  });
}

StagedBackend::Work StagedBackend::alltoall(Tensors& outputs, Tensors& inputs,
                                            const c10d::AllToAllOptions& options) {
  return run(OpType::ALLTOALL, device_of(inputs), [&](Staging& staging) {
    return [this, to = staging.outputs(outputs), from = staging.inputs(inputs), options]() mutable {
      return host_->alltoall(to, from, options);
    };
  });
}

StagedBackend::Work StagedBackend::send(Tensors& tensors, int destination, int tag) {
  return run(OpType::SEND, device_of(tensors), [&](Staging& staging) {
    return [this, from = staging.inputs(tensors), destination, tag]() mutable {
      return host_->send(from, destination, tag);
    };
  });
}

StagedBackend::Work StagedBackend::recv(Tensors& tensors, int source, int tag) {
  return run(OpType::RECV, device_of(tensors), [&](Staging& staging) {
    return [this, to = staging.outputs(tensors), source, tag]() mutable {
      return host_->recv(to, source, tag);
    };
  });
}

StagedBackend::Work StagedBackend::recvAnysource(Tensors& tensors, int tag) {
  return run(OpType::RECVANYSOURCE, device_of(tensors), [&](Staging& staging) {
    return [this, to = staging.outputs(tensors), tag]() mutable {
      return host_->recvAnysource(to, tag);
    };
  });
}

StagedBackend::Work StagedBackend::barrier(const c10d::BarrierOptions& options) {
  c10d::BarrierOptions here = options;
  here.device.reset();  // it names the caller's device, and the host's backend has none
  here.device_ids.clear();
  return host_->barrier(here);
}

}  // namespace distro::c10d_backend
