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

namespace {

c10::intrusive_ptr<c10d::Work> exact_mean(const at::Tensor& gradients, std::size_t ranks,
                                          const std::shared_ptr<exchange::Group>& group,
                                          const InnerBackend& inner,
                                          const std::shared_ptr<Operations>& operations,
                                          const Operations::Ticket& ticket) {
  {
    const PlainArithmetic plain;
    gradients.div_(static_cast<std::int64_t>(ranks));
  }
  std::vector<at::Tensor> tensors = {gradients};
  return c10::make_intrusive<ExactWork>(
      ExactWork::Call{c10d::OpType::ALLREDUCE, "distro:all_reduce", tensors, tensors, ticket},
      group, operations, [&] { return inner->allreduce(tensors); }, std::function<void()>{});
}

}  // namespace

c10::intrusive_ptr<c10d::Work> exact_mean_of_bucket(const at::Tensor& buffer,
                                                    const std::shared_ptr<exchange::Group>& group,
                                                    const InnerBackend& inner,
                                                    const std::shared_ptr<Operations>& operations) {
  const std::size_t bytes = bytes_of(buffer);
  group->counters().exact.fetch_add(1, std::memory_order_relaxed);
  group->counters().exact_bytes.fetch_add(bytes, std::memory_order_relaxed);
  const auto ticket = operations->begin("all_reduce", /*point_to_point=*/false, bytes);
  return exact_mean(buffer, static_cast<std::size_t>(group->world_size()), group, inner, operations,
                    ticket);
}

c10::intrusive_ptr<c10d::Work> exact_mean_in_site(const at::Tensor& gradients,
                                                  const std::shared_ptr<exchange::Group>& group,
                                                  const InnerBackend& site,
                                                  const std::shared_ptr<Operations>& operations,
                                                  const Operations::Ticket& ticket) {
  group->counters().site_bytes.fetch_add(bytes_of(gradients), std::memory_order_relaxed);
  return exact_mean(gradients, group->sites().site_of(group->rank()).size(), group, site,
                    operations, ticket);
}

}  // namespace distro::c10d_backend
