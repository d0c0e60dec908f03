#include "backend/c10d/exact_collectives.h"

#include <ATen/ATen.h>

#include "backend/c10d/errors.h"

namespace distro::c10d_backend {
namespace {

at::Tensor wrap(const plugins::TensorView& view) {
  return at::from_blob(view.data, {static_cast<std::int64_t>(view.elements)},
                       at::TensorOptions().dtype(scalar_type(view.dtype)));
}

}  // namespace

at::ScalarType scalar_type(kernels::DType dtype) {
  switch (dtype) {
    case kernels::DType::f32:
      return at::kFloat;
    case kernels::DType::f64:
      return at::kDouble;
    case kernels::DType::f16:
      return at::kHalf;
    case kernels::DType::bf16:
      return at::kBFloat16;
  }
  return at::kFloat;
}

std::optional<kernels::DType> codec_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return kernels::DType::f32;
    case at::kDouble:
      return kernels::DType::f64;
    case at::kHalf:
      return kernels::DType::f16;
    case at::kBFloat16:
      return kernels::DType::bf16;
    default:
      return std::nullopt;
  }
}

void InnerCollectives::count(const at::Tensor& tensor) {
  group_->counters().exact.fetch_add(1, std::memory_order_relaxed);
  group_->counters().exact_bytes.fetch_add(tensor.nbytes(), std::memory_order_relaxed);
}

void InnerCollectives::mean(std::span<const plugins::TensorView> tensors) {
  const at::NoGradGuard no_grad;
  for (const auto& view : tensors) {
    at::Tensor target = wrap(view);
    const bool half = view.dtype == kernels::DType::f16 || view.dtype == kernels::DType::bf16;
    std::vector<at::Tensor> sum = {half ? target.to(at::kFloat) : target};
    translate(*group_, "the exact mean of the weights", [&] { inner_->allreduce(sum)->wait(); });
    count(sum[0]);
    sum[0].div_(group_->world_size());
    if (half) {
      target.copy_(sum[0]);
    }
  }
}

void InnerCollectives::broadcast(std::span<const plugins::TensorView> tensors) {
  const at::NoGradGuard no_grad;
  for (const auto& view : tensors) {
    std::vector<at::Tensor> target = {wrap(view)};
    translate(*group_, "the broadcast of rank 0's weights",
              [&] { inner_->broadcast(target)->wait(); });
    count(target[0]);
  }
}

}  // namespace distro::c10d_backend
