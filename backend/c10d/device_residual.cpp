#include "backend/c10d/device_residual.h"

namespace distro::c10d_backend {

DeviceResidual::DeviceResidual(std::uint32_t bits, std::int64_t slots, at::Device device)
    : type_(bits == 16 ? at::kBFloat16 : at::kFloat), slots_(slots), device_(device) {}

void DeviceResidual::keep() {
  if (!kept()) {
    memory_ = at::zeros({slots_}, at::TensorOptions().device(device_).dtype(type_));
  }
}

void DeviceResidual::fill_zeros() {
  if (kept()) {
    memory_.zero_();
  }
}

at::Tensor DeviceResidual::open(std::int64_t begin, std::int64_t slots, bool read) const {
  if (kept() && !rounds()) {
    at::Tensor values = memory_.narrow(0, begin, slots);
    return read ? values : values.zero_();
  }
  return kept() && read ? memory_.narrow(0, begin, slots).to(at::kFloat)
                        : at::zeros({slots}, at::TensorOptions().device(device_).dtype(at::kFloat));
}

void DeviceResidual::close(at::Tensor& values, std::int64_t begin) const {
  if (kept() && rounds()) {
    at::Tensor rounded = memory_.narrow(0, begin, values.numel());
    rounded.copy_(values);
    values.copy_(rounded);
  }
}

}  // namespace distro::c10d_backend
