#include "backend/c10d/recognition.h"

#include <fmt/format.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>

#include "backend/c10d/tensors.h"

namespace distro::c10d_backend {
namespace {

// The name of torch.distributed.fsdp's (FSDP2) own autograd function.
constexpr std::string_view kPostBackward = "RegisterPostBackwardFunctionBackward";

double factor_of(const c10d::ReduceOp& op) {
  const auto* supplement = dynamic_cast<const c10d::NCCLPreMulSumSupplement*>(op.supplement_.get());
  TORCH_CHECK(supplement != nullptr, "PREMUL_SUM without its factor");
  return supplement->tensor_factor.defined() ? supplement->tensor_factor.item<double>()
                                             : supplement->double_factor;
}

}  // namespace

bool is_candidate(const at::Tensor& tensor, const c10d::ReduceOp& op, std::uint64_t min_elements) {
  const bool sums =
      op == c10d::ReduceOp::SUM || op == c10d::ReduceOp::AVG || op == c10d::ReduceOp::PREMUL_SUM;
  return sums && tensor.layout() == at::kStrided && tensor.device().is_cpu() &&
         codec_type(tensor.scalar_type()) && tensor.is_non_overlapping_and_dense() &&
         static_cast<std::uint64_t>(tensor.numel()) >= min_elements;
}

std::optional<GradientPlace> gradient_place() {
  const int graph_task = torch::autograd::get_current_graph_task_id();
  if (graph_task < 0) {
    return std::nullopt;
  }
  const auto node = torch::autograd::get_current_node();  // its pointer's type differs by version
  if (!node) {
    return GradientPlace{graph_task, {}};
  }
  if (const auto* accumulate = dynamic_cast<const torch::autograd::AccumulateGrad*>(node.get())) {
    return GradientPlace{graph_task, accumulate->variable};
  }
  if (node->name() == kPostBackward) {
    return GradientPlace{graph_task, {}};
  }
  return std::nullopt;
}

std::string text_of(const c10d::ReduceOp& op) {
  switch (op) {
    case c10d::ReduceOp::SUM:
      return "SUM";
    case c10d::ReduceOp::AVG:
      return "AVG";
    default:
      return fmt::format("PREMUL_SUM {}", factor_of(op));
  }
}

float weight_of(const c10d::ReduceOp& op, int world_size) {
  switch (op) {
    case c10d::ReduceOp::SUM:
      return 1.0F;
    case c10d::ReduceOp::AVG:
      return 1.0F / static_cast<float>(world_size);
    default:
      return static_cast<float>(factor_of(op));
  }
}

}  // namespace distro::c10d_backend
