#pragma once

#include <span>

#include "plugins/tensor_view.h"

namespace distro::exchange {

/// The few exact collectives that a synchroniser needs; the c10d room gives them by the inner
/// backend. Every rank of the group calls the same function with tensors of the same shapes in the
/// same order. Throws on failure (the caller lets it pass).
class ExactCollectives {
 public:
  virtual ~ExactCollectives() = default;

  /// Replace each tensor by its mean over all ranks, summed in at least fp32, the same bits on all
  /// ranks.
  virtual void mean(std::span<const plugins::TensorView> tensors) = 0;

  /// Replace each tensor by rank 0's.
  virtual void broadcast(std::span<const plugins::TensorView> tensors) = 0;
};

}  // namespace distro::exchange
