#include "backend/c10d/tensors.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

namespace distro::c10d_backend {

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

at::Tensor memory_of(const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.is_non_overlapping_and_dense(), "expected a dense tensor");
  return tensor.detach().as_strided({tensor.numel()}, {1});
}

plugins::TensorView view_of(const at::Tensor& tensor) {
  const auto type = codec_type(tensor.scalar_type());
  TORCH_CHECK_TYPE(type && tensor.is_contiguous(), "expected a contiguous floating-point tensor");
  return {tensor.data_ptr(), *type, static_cast<std::size_t>(tensor.numel())};
}

at::Tensor tensor_of(const plugins::TensorView& view, at::Device device) {
  return at::for_blob(view.data, {static_cast<std::int64_t>(view.elements)})
      .options(at::TensorOptions().dtype(scalar_type(view.dtype)).device(device))
      .target_device(device)
      .make_tensor();
}

std::size_t bytes_of(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided ? tensor.nbytes() : 0;
}

std::vector<c10::Device> devices_of(const std::vector<at::Tensor>& tensors) {
  std::vector<c10::Device> devices;
  for (const auto& tensor : tensors) {
    if (!tensor.device().is_cpu() && std::ranges::find(devices, tensor.device()) == devices.end()) {
      devices.push_back(tensor.device());
    }
  }
  return devices;
}

void synchronise(at::Device device) {
  if (!device.is_cpu()) {
    c10::impl::VirtualGuardImpl(device.type()).getStream(device).synchronize();
  }
}

at::Tensor host_like(const at::Tensor& tensor, at::Device device) {
  return at::empty(tensor.sizes(),
                   at::TensorOptions().dtype(tensor.scalar_type()).pinned_memory(!device.is_cpu()));
}

at::Tensor to_host(const at::Tensor& tensor) {
  if (tensor.device().is_cpu()) {
    return tensor;
  }
  at::Tensor host = host_like(tensor, tensor.device());
  host.copy_(tensor, /*non_blocking=*/true);
  synchronise(tensor.device());
  return host;
}

}  // namespace distro::c10d_backend
