#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace distro::c10d_backend {

/// The memory of R on a device, by slot (DeviceLayout): fp32, or rounded to bf16; or none, where x
/// says what R is. As plugins::ResidualStore. Not thread-safe.
class DeviceResidual {
 public:
  /// `bits`: 32, or 16 for bf16. `slots`: of all turns.
  DeviceResidual(std::uint32_t bits, std::int64_t slots, at::Device device);

  [[nodiscard]] bool kept() const noexcept { return memory_.defined(); }
  [[nodiscard]] bool rounds() const noexcept { return type_ != at::kFloat; }
  /// From now on there is memory; zeros, unless it was there.
  void keep();
  /// There is none any more, and it goes back to torch's allocator.
  void drop();
  void fill_zeros();

  /// [slots] fp32 values from slot `begin` on, to read and to change until they are closed; zeros
  /// where none are kept. The memory itself, or a copy.
  [[nodiscard]] at::Tensor open(std::int64_t begin, std::int64_t slots);
  /// The same, but what is kept does not count any more: zeros.
  [[nodiscard]] at::Tensor open_anew(std::int64_t begin, std::int64_t slots);
  /// Keeps what was opened; `values` are then what is kept.
  void close(const at::Tensor& values, std::int64_t begin);

  /// [slots of all turns], fp32 or bf16; undefined where none is kept.
  [[nodiscard]] const at::Tensor& memory() const noexcept { return memory_; }

 private:
  at::ScalarType type_;
  std::int64_t slots_;
  at::Device device_;
  at::Tensor memory_;
};

}  // namespace distro::c10d_backend
