#include "backend/c10d/staging.h"

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "backend/c10d/tensors.h"

namespace distro::c10d_backend {

at::Tensor Staging::input(const at::Tensor& tensor) {
  const PlainArithmetic plain;
  TORCH_CHECK_VALUE(tensor.device() == device_,
                    "all tensors of a collective must be on one device,", " got ", device_, " and ",
                    tensor.device());
  if (tensor.layout() != at::kStrided) {  // sparse: few values, and no pinned memory for them
    inputs_.push_back(tensor.device().is_cpu() ? tensor.clone() : tensor.cpu());
    return inputs_.back();
  }
  at::Tensor host = host_like(tensor, device_);
  host.copy_(tensor, /*non_blocking=*/true);
  inputs_.push_back(host);
  return host;
}

at::Tensor Staging::output(const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.device() == device_,
                    "all tensors of a collective must be on one device,", " got ", device_, " and ",
                    tensor.device());
  outputs_.push_back({tensor, host_like(tensor, device_)});
  return outputs_.back().host;
}

at::Tensor Staging::in_place(const at::Tensor& tensor) {
  const at::Tensor host = input(tensor);
  outputs_.push_back({tensor, host});
  return host;
}

std::vector<at::Tensor> Staging::inputs(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> hosts;
  for (const auto& tensor : tensors) {
    hosts.push_back(input(tensor));
  }
  return hosts;
}

std::vector<at::Tensor> Staging::outputs(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> hosts;
  for (const auto& tensor : tensors) {
    hosts.push_back(output(tensor));
  }
  return hosts;
}

std::vector<at::Tensor> Staging::in_place(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> hosts;
  for (const auto& tensor : tensors) {
    hosts.push_back(in_place(tensor));
  }
  return hosts;
}

void Staging::ready() {
  if (device_.is_cpu()) {
    return;
  }
  // Recorded behind the copies, and behind whatever still reads or writes the outputs.
  begun_.emplace(device_.type());
  begun_->record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  if (!inputs_.empty()) {
    begun_->synchronize();
  }
}

void Staging::deliver(const std::function<void()>& done) {
  const PlainArithmetic plain;
  if (device_.is_cpu()) {
    for (const auto& [tensor, host] : outputs_) {
      tensor.copy_(host);
    }
    done();
    return;
  }
  const c10::impl::VirtualGuardImpl device(device_.type());
  const c10::Stream stream = device.getStreamFromGlobalPool(device_);
  const c10::StreamGuard guard(stream);
  begun_->block(stream);
  for (const auto& [tensor, host] : outputs_) {
    tensor.copy_(host, /*non_blocking=*/true);
    if (tensor.layout() == at::kStrided) {
      device.recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
    }
  }
  done();
}

std::vector<at::Tensor> Staging::delivered() const {
  std::vector<at::Tensor> tensors;
  for (const auto& output : outputs_) {
    tensors.push_back(output.tensor);
  }
  return tensors;
}

}  // namespace distro::c10d_backend
