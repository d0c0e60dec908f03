#include "backend/c10d/reduction.h"

#include <utility>

namespace distro::c10d_backend {
namespace {

bool integral(const at::Tensor& tensor) {
  return at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false);
}

}  // namespace

c10d::ReduceOp Reduction::inner_op() const {
  return averages() || scales() ? c10d::ReduceOp(c10d::ReduceOp::SUM) : op_;
}

// Integers of less than 64 bits are averaged in 64, where their sum cannot overflow.
bool Reduction::widens(const at::Tensor& tensor) const {
  return averages() && integral(tensor) && tensor.scalar_type() != at::kLong;
}

at::Tensor Reduction::scaled(const at::Tensor& input) const {
  TORCH_CHECK_TYPE(input.is_floating_point() || input.is_complex(),
                   "PREMUL_SUM needs floating-point tensors, and this one is ",
                   input.scalar_type());
  // The name before 2.14; later ones keep it.
  const auto* supplement =
      dynamic_cast<const c10d::NCCLPreMulSumSupplement*>(op_.supplement_.get());
  TORCH_CHECK_VALUE(supplement != nullptr, "PREMUL_SUM comes without a factor");
  if (supplement->tensor_factor.defined()) {
    return input.mul(supplement->tensor_factor.to(input.device(), input.scalar_type()).reshape({}));
  }
  return input.mul(supplement->double_factor);
}

std::vector<at::Tensor> Reduction::prepare(const std::vector<at::Tensor>& inputs) const {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> prepared;
  prepared.reserve(inputs.size());
  for (const auto& input : inputs) {
    TORCH_CHECK_TYPE(!averages() || input.scalar_type() != at::kBool,
                     "the average of bool tensors has no meaning; use MAX, MIN or SUM");
    prepared.push_back(scales() ? scaled(input) : widens(input) ? input.to(at::kLong) : input);
  }
  return prepared;
}

std::vector<at::Tensor> Reduction::receive(const std::vector<at::Tensor>& outputs) const {
  std::vector<at::Tensor> received;
  received.reserve(outputs.size());
  for (const auto& output : outputs) {
    received.push_back(widens(output) ? at::empty_like(output, output.options().dtype(at::kLong))
                                      : output);
  }
  return received;
}

std::function<void()> Reduction::conclude(std::vector<at::Tensor> reduced,
                                          std::vector<at::Tensor> outputs) const {
  if (!averages() && !scales()) {
    return {};
  }
  return [reduced = std::move(reduced), outputs = std::move(outputs), average = averages(),
          size = world_size_]() mutable {
    const at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      if (average && integral(reduced[i])) {
        reduced[i].div_(size, "trunc");
      } else if (average) {
        reduced[i].div_(size);
      }
      if (!reduced[i].is_same(outputs[i])) {
        outputs[i].copy_(reduced[i]);
      }
    }
  };
}

}  // namespace distro::c10d_backend
