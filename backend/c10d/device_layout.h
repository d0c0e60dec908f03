#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <span>
#include <vector>

#include "plugins/module_codec.h"

namespace distro::c10d_backend {

/// Where a module's weights lie in a codec's memory on a device: tile t at slots [4096 t, 4096 t +
/// its elements), zeros behind it, so that all tiles are rows of one matrix. Tensors are contiguous
/// in it, as in the geometry.
class DeviceLayout {
 public:
  explicit DeviceLayout(const plugins::Geometry& geometry);

  [[nodiscard]] std::int64_t tiles() const noexcept { return tiles_; }
  [[nodiscard]] std::int64_t slots() const noexcept;
  /// The tensor's first slot.
  [[nodiscard]] std::int64_t slot(std::size_t tensor) const { return slots_[tensor]; }

  /// Slots whose weights have one type, and the script's tensors there.
  struct Chunk {
    at::ScalarType type = at::kFloat;
    std::int64_t begin = 0;  ///< First slot.
    std::int64_t slots = 0;

    /// All slots' weights as one flat tensor of `type`: the script's values, zeros between them.
    /// The script's own memory where it is one tensor.
    [[nodiscard]] at::Tensor weights() const;
    /// Copy `slots` values of `type` to the script's tensors.
    void assign(const at::Tensor& values) const;

   private:
    friend class DeviceLayout;
    std::vector<at::Tensor> tensors_;    // the script's, in slot order, each flat
    std::vector<std::int64_t> at_;       // their slots, from begin
    std::vector<std::int64_t> padding_;  // zeros behind each
  };

  /// The script's tensors cut into chunks of bounded size (or one tensor), in slot order.
  [[nodiscard]] std::vector<Chunk> chunks(std::span<const plugins::TensorView> x,
                                          at::Device device) const;

 private:
  std::int64_t tiles_ = 0;
  std::vector<std::int64_t> slots_;    // by tensor
  std::vector<std::size_t> order_;     // tensors with elements, by slot
  std::vector<std::int64_t> lengths_;  // by order: slots up to the next tensor
};

}  // namespace distro::c10d_backend
