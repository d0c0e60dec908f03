#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <vector>

namespace distro::c10d_backend {

/// Operators that the inner backend is not trusted with (its AVG of reduce-scatter was silently
/// wrong, PyTorch issue 162338; integers it cannot average) or does not have (PREMUL_SUM), made
/// from SUM: what to do to the inputs before it and to the outputs after it.
///
/// AVG of floating-point tensors: SUM in their own type, then a division by the number of ranks.
/// AVG of integers: exact in 64 bits (int64 itself may overflow, as its SUM does), then divided,
/// rounding toward zero as C and NCCL do. PREMUL_SUM: the factor times each rank's input, in the
/// input's type, then SUM. Every other operator passes through.
class Reduction {
 public:
  /// `op` as the caller gave it. Throws c10::TypeError for a tensor that the operator makes no
  /// sense for: AVG of bool, PREMUL_SUM of anything but floating point and complex.
  Reduction(const c10d::ReduceOp& op, int world_size) : op_(op), world_size_(world_size) {}

  /// The operator for the inner backend.
  [[nodiscard]] c10d::ReduceOp inner_op() const;

  /// What the inner backend is to reduce: the tensors themselves, or prepared copies.
  [[nodiscard]] std::vector<at::Tensor> prepare(const std::vector<at::Tensor>& inputs) const;

  /// Where the inner backend is to put results for these outputs, whose contents do not matter yet:
  /// themselves, or tensors of the wider type.
  [[nodiscard]] std::vector<at::Tensor> receive(const std::vector<at::Tensor>& outputs) const;

  /// The last act: from what the inner backend left in `reduced` to the caller's `outputs`. Empty
  /// where nothing is left to do.
  [[nodiscard]] std::function<void()> conclude(std::vector<at::Tensor> reduced,
                                               std::vector<at::Tensor> outputs) const;

 private:
  [[nodiscard]] bool averages() const { return op_ == c10d::ReduceOp::AVG; }
  [[nodiscard]] bool scales() const { return op_ == c10d::ReduceOp::PREMUL_SUM; }
  [[nodiscard]] bool widens(const at::Tensor& tensor) const;
  [[nodiscard]] at::Tensor scaled(const at::Tensor& input) const;

  const c10d::ReduceOp op_;
  const int world_size_;
};

}  // namespace distro::c10d_backend
