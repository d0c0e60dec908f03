#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Types.hpp>

namespace distro::c10d_backend {

/// Whether a collective on this tensor looks like a gradient reduction: dense floating memory on
/// the CPU, SUM, AVG or PREMUL_SUM, at least so many elements.
[[nodiscard]] bool is_candidate(const at::Tensor& tensor, const c10d::ReduceOp& op,
                                std::uint64_t min_elements);

/// Where autograd stands when a gradient is reduced.
struct GradientPlace {
  int graph_task = 0;   ///< Number of the backward.
  at::Tensor variable;  ///< Whose gradient was just accumulated; undefined where that is not known.
};

/// Where the calling thread stands, if that is a place from which DDP and FSDP reduce gradients:
/// inside a backward, at an AccumulateGrad, at FSDP2's post-backward or at no node (a backward's
/// final callbacks). Differentiable collectives, SyncBatchNorm, tensor parallelism and a script's
/// own autograd functions stand at nodes of their own.
[[nodiscard]] std::optional<GradientPlace> gradient_place();

/// The operator as all ranks must have it: name, and PREMUL_SUM's factor.
[[nodiscard]] std::string text_of(const c10d::ReduceOp& op);

/// What each rank's input counts in the result.
[[nodiscard]] float weight_of(const c10d::ReduceOp& op, int world_size);

}  // namespace distro::c10d_backend
