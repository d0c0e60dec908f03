#pragma once

#include <ATen/core/Tensor.h>

#include <exception>
#include <functional>
#include <memory>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

namespace distro::c10d_backend {

/// An operation of TransportBackend. Completes by itself, on a thread of the engine's.
class TransferWork final : public c10d::Work {
 public:
  TransferWork(int rank, c10d::OpType operation, std::vector<at::Tensor> outputs);

  /// Once; null: the outputs are written.
  void complete(const std::exception_ptr& error);

  /// Of a receive: who sent it. Before complete().
  void set_source(int rank) { source_ = rank; }

  int sourceRank() const override { return source_; }
  std::vector<at::Tensor> result() override { return outputs_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

 private:
  const std::vector<at::Tensor> outputs_;
  const c10::intrusive_ptr<c10::ivalue::Future> future_;  // its value is the outputs
  int source_ = -1;
};

}  // namespace distro::c10d_backend
