#pragma once

#include <cstddef>

#include "kernels/kernels.h"

namespace distro::plugins {

/// The script's weights or gradients of one parameter, as they lie in memory now. Borrowed for one
/// call.
struct TensorView {
  void* data = nullptr;
  kernels::DType dtype = kernels::DType::f32;
  std::size_t elements = 0;
};

/// The address of one element.
[[nodiscard]] inline void* address(const TensorView& tensor, std::size_t element) noexcept {
  return static_cast<std::byte*>(tensor.data) + element * kernels::size_of(tensor.dtype);
}

}  // namespace distro::plugins
