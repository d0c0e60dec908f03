#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "backend/c10d/inner_backend.h"
#include "backend/c10d/operations.h"
#include "backend/exchange/exact.h"
#include "backend/exchange/group.h"

namespace distro::c10d_backend {

/// The synchroniser's exact collectives, by the inner backend, on tensors of one device. 16-bit
/// tensors are summed in fp32.
class InnerCollectives : public exchange::ExactCollectives {
 public:
  InnerCollectives(InnerBackend inner, std::shared_ptr<exchange::Group> group, at::Device device)
      : inner_(std::move(inner)), group_(std::move(group)), device_(device) {}

  void mean(std::span<const plugins::TensorView> tensors) override;
  void broadcast(std::span<const plugins::TensorView> tensors) override;

 private:
  void count(const at::Tensor& tensor);

  const InnerBackend inner_;
  const std::shared_ptr<exchange::Group> group_;
  const at::Device device_;
};

/// The exact mean of a bucket that DDP's reducer gave its hook, in place: with a hook DDP does not
/// divide. On autograd's thread; throws c10::DistBackendError.
[[nodiscard]] c10::intrusive_ptr<c10d::Work> exact_mean_of_bucket(
    const at::Tensor& buffer, const std::shared_ptr<exchange::Group>& group,
    const InnerBackend& inner, const std::shared_ptr<Operations>& operations);

/// The exact mean of gradients over the ranks of this rank's site, in place, which is a part of the
/// group (`site`: their inner backend). On autograd's thread; throws c10::DistBackendError.
[[nodiscard]] c10::intrusive_ptr<c10d::Work> exact_mean_in_site(
    const at::Tensor& gradients, const std::shared_ptr<exchange::Group>& group,
    const InnerBackend& site, const std::shared_ptr<Operations>& operations,
    const Operations::Ticket& ticket);

}  // namespace distro::c10d_backend
