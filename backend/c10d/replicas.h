#pragma once

#include <ATen/ATen.h>

#include <torch/csrc/distributed/c10d/Types.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

namespace distro::c10d_backend {

/// Who takes the gradient all-reduces between the replicas of a sharded module, instead of the
/// inner backend. See ProcessGroupDistro::hand_replicas_to().
class ReplicaGradients {
 public:
  ReplicaGradients() = default;
  virtual ~ReplicaGradients() = default;
  ReplicaGradients(const ReplicaGradients&) = delete;
  ReplicaGradients& operator=(const ReplicaGradients&) = delete;

  /// Take this rank's gradient, and leave in it what stands for the reduction; false: reduce it
  /// exactly. On autograd's thread.
  virtual bool take(at::Tensor& gradient, const c10d::ReduceOp& op) = 0;
};

/// Make of a rank's own gradient what the reduction of `ranks` equal ones would be. Throws
/// c10::ValueError for an operator that is no sum.
void as_if_reduced(at::Tensor& gradient, const c10d::ReduceOp& op, int ranks);

/// The Work of an operation that is done already.
[[nodiscard]] c10::intrusive_ptr<c10d::Work> done(int rank, c10d::OpType type, const char* title,
                                                  std::vector<at::Tensor> tensors);

}  // namespace distro::c10d_backend
