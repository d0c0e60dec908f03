#include "backend/c10d/device_residual.h"

#include "backend/c10d/tensors.h"

namespace distro::c10d_backend {

DeviceResidual::DeviceResidual(std::uint32_t bits, std::int64_t slots, at::Device device)
    : type_(bits == 16 ? at::kBFloat16 : at::kFloat), slots_(slots), device_(device) {}

void DeviceResidual::keep() {
  if (!kept()) {
    memory_ = at::zeros({slots_}, at::TensorOptions().device(device_).dtype(type_));
  }
}

void DeviceResidual::drop() {
  if (kept()) {
    synchronise(device_);  // the memory may go to a stream that does not wait for this one
    memory_.reset();
  }
}

void DeviceResidual::fill_zeros() {
  if (kept()) {
    memory_.zero_();
  }
}

at::Tensor DeviceResidual::open(std::int64_t begin, std::int64_t slots) {
  if (!kept()) {
    return open_anew(begin, slots);
  }
  const at::Tensor kept_values = memory_.narrow(0, begin, slots);
  return rounds() ? kept_values.to(at::kFloat) : kept_values;
}

at::Tensor DeviceResidual::open_anew(std::int64_t begin, std::int64_t slots) {
  return kept() && !rounds()
             ? memory_.narrow(0, begin, slots).zero_()
             : at::zeros({slots}, at::TensorOptions().device(device_).dtype(at::kFloat));
}

void DeviceResidual::close(const at::Tensor& values, std::int64_t begin) {
  if (kept() && rounds()) {
    const at::Tensor rounded = memory_.narrow(0, begin, values.numel());
    rounded.copy_(values);
    values.copy_(rounded);
  }
}

}  // namespace distro::c10d_backend
