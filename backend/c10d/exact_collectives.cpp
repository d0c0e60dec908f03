#include "backend/c10d/exact_collectives.h"

#include <ATen/ATen.h>

#include "backend/c10d/errors.h"
#include "backend/c10d/exact_work.h"
#include "backend/c10d/tensors.h"

namespace distro::c10d_backend {
void InnerCollectives::count(const at::Tensor& tensor) {
  group_->counters().exact.fetch_add(1, std::memory_order_relaxed);
  group_->counters().exact_bytes.fetch_add(tensor.nbytes(), std::memory_order_relaxed);
}

void InnerCollectives::mean(std::span<const plugins::TensorView> tensors) {
  const PlainArithmetic plain;
  for (const auto& view : tensors) {
    at::Tensor target = tensor_of(view, device_);
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
  const PlainArithmetic plain;
  for (const auto& view : tensors) {
    std::vector<at::Tensor> target = {tensor_of(view, device_)};
    translate(*group_, "the broadcast of rank 0's weights",
              [&] { inner_->broadcast(target)->wait(); });
    count(target[0]);
  }
}

c10::intrusive_ptr<c10d::Work> exact_mean_of_bucket(const at::Tensor& buffer,
                                                    const std::shared_ptr<exchange::Group>& group,
                                                    const InnerBackend& inner,
                                                    const std::shared_ptr<Operations>& operations) {
  {
    const PlainArithmetic plain;
    buffer.div_(group->world_size());
  }
  std::vector<at::Tensor> tensors = {buffer};
  const std::size_t bytes = buffer.layout() == at::kStrided ? buffer.nbytes() : 0;
  group->counters().exact.fetch_add(1, std::memory_order_relaxed);
  group->counters().exact_bytes.fetch_add(bytes, std::memory_order_relaxed);
  const auto ticket = operations->begin("all_reduce", /*point_to_point=*/false, bytes);
  return c10::make_intrusive<ExactWork>(
      ExactWork::Call{c10d::OpType::ALLREDUCE, "distro:all_reduce", tensors, tensors, ticket},
      group, operations, [&] { return inner->allreduce(tensors); }, std::function<void()>{});
}

}  // namespace distro::c10d_backend
