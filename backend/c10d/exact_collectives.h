#pragma once

#include <memory>

#include "backend/c10d/inner_backend.h"
#include "backend/exchange/exact.h"
#include "backend/exchange/group.h"

namespace distro::c10d_backend {

/// The synchroniser's exact collectives, by the inner backend, on CPU tensors. 16-bit tensors are
/// summed in fp32.
class InnerCollectives : public exchange::ExactCollectives {
 public:
  InnerCollectives(InnerBackend inner, std::shared_ptr<exchange::Group> group)
      : inner_(std::move(inner)), group_(std::move(group)) {}

  void mean(std::span<const plugins::TensorView> tensors) override;
  void broadcast(std::span<const plugins::TensorView> tensors) override;

 private:
  void count(const at::Tensor& tensor);

  const InnerBackend inner_;
  const std::shared_ptr<exchange::Group> group_;
};

/// The torch type of a codec type, and back (empty: not a type that weights mode exchanges).
at::ScalarType scalar_type(kernels::DType dtype);
std::optional<kernels::DType> codec_type(at::ScalarType type);

}  // namespace distro::c10d_backend
