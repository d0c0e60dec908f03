#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "plugins/module_codec.h"

/// Small bridges between torch's tensors and the torch-free core. Device-independent: nothing here
/// links a CUDA library.
namespace distro::c10d_backend {

/// Arithmetic as written while it lives: no autograd, and no autocast, under which a script may
/// call us.
class PlainArithmetic {
 public:
  PlainArithmetic() = default;

 private:
  at::NoGradGuard no_grad_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

/// PlainArithmetic on tensors that outlive the call: they are no inference tensors, whatever mode a
/// script calls us in.
class LastingArithmetic {
 public:
  LastingArithmetic() = default;

 private:
  c10::InferenceMode normal_{false};  // first: it switches autograd on
  PlainArithmetic plain_;
};

/// The torch type of a codec type, and back (empty: not a type that weights mode exchanges).
[[nodiscard]] at::ScalarType scalar_type(kernels::DType dtype);
[[nodiscard]] std::optional<kernels::DType> codec_type(at::ScalarType type);

/// The memory of a dense tensor, in whatever order its dimensions lie, as a flat one.
[[nodiscard]] at::Tensor memory_of(const at::Tensor& tensor);

/// A contiguous tensor's memory, of a type that weights mode exchanges; and a flat tensor over a
/// view's memory, which lies on `device`. Neither owns it.
[[nodiscard]] plugins::TensorView view_of(const at::Tensor& tensor);
[[nodiscard]] at::Tensor tensor_of(const plugins::TensorView& view, at::Device device);

/// Bytes of the elements of a dense tensor; 0 for others.
[[nodiscard]] std::size_t bytes_of(const at::Tensor& tensor);

/// The devices other than the CPU on which the tensors lie: what a Future of them is made with.
[[nodiscard]] std::vector<c10::Device> devices_of(const std::vector<at::Tensor>& tensors);

/// Wait until the work on the current stream of this device is done; nothing for the CPU.
void synchronise(at::Device device);

/// An uninitialised contiguous host tensor with this tensor's type and shape, pinned if it is to be
/// copied from or to a device.
[[nodiscard]] at::Tensor host_like(const at::Tensor& tensor, at::Device device);

/// A copy of host values on the device, in the order of the current stream.
template <class Value>
[[nodiscard]] at::Tensor to_device(std::span<const Value> values, at::Device device) {
  at::Tensor host = at::empty({static_cast<std::int64_t>(values.size())},
                              at::TensorOptions()
                                  .dtype(c10::CppTypeToScalarType<Value>::value)
                                  .pinned_memory(!device.is_cpu()));
  std::ranges::copy(values, host.mutable_data_ptr<Value>());
  return host.to(device, /*non_blocking=*/true);
}

/// The values in host memory, copied in the order of the current stream and there on return; the
/// tensor itself if it lies there.
[[nodiscard]] at::Tensor to_host(const at::Tensor& tensor);

}  // namespace distro::c10d_backend
