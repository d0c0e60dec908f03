#pragma once

#include <cstddef>
#include <cstring>

#include "kernels/half.h"
#include "kernels/kernels.h"

/// Elements of any type, written and read as double.
namespace distro::kernels {

inline void put(DType dtype, std::byte* x, std::size_t i, double value) {
  const auto store = [&](auto element) {
    std::memcpy(x + i * sizeof(element), &element, sizeof(element));
  };
  const auto narrow = static_cast<float>(value);
  switch (dtype) {
    case DType::f32:
      store(narrow);
      break;
    case DType::f64:
      store(value);
      break;
    case DType::f16:
      store(to_f16(narrow));
      break;
    case DType::bf16:
      store(to_bf16(narrow));
      break;
  }
}

inline double get(DType dtype, const std::byte* x, std::size_t i) {
  const auto load = [&](auto element) {
    std::memcpy(&element, x + i * sizeof(element), sizeof(element));
    return element;
  };
  switch (dtype) {
    case DType::f32:
      return static_cast<double>(load(float{}));
    case DType::f64:
      return load(double{});
    case DType::f16:
      return static_cast<double>(from_f16(load(std::uint16_t{})));
    case DType::bf16:
      return static_cast<double>(from_bf16(load(std::uint16_t{})));
  }
  return 0.0;
}

}  // namespace distro::kernels
