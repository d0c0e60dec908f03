#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <span>
#include <vector>

#include "plugins/module_codec.h"

namespace distro::c10d_backend {

/// Where the weights of one turn lie in a codec's memory on a device: tile t of the turn at slots
/// [4096 t, 4096 t + its elements), zeros behind it, so that all tiles are rows of one matrix. What
/// a tensor has of the turn is contiguous in it, as in the geometry.
class DeviceLayout {
 public:
  /// `first_slot`: where the turn begins in the memory of all turns.
  DeviceLayout(const plugins::Geometry& geometry, std::size_t turn, std::int64_t first_slot);

  [[nodiscard]] std::int64_t first_slot() const noexcept { return first_slot_; }
  [[nodiscard]] std::int64_t slots() const noexcept;

  /// Views of what a flat tensor has of the turn, in slot order: at most two.
  [[nodiscard]] std::vector<at::Tensor> parts(const at::Tensor& flat) const;

  /// Copy what the tensor has of the turn between its values, flat and in its own order, and the
  /// memory of all turns; all on one device.
  void take(std::size_t tensor, const at::Tensor& slots, const at::Tensor& values) const;
  void put(std::size_t tensor, const at::Tensor& values, const at::Tensor& slots) const;

  /// Slots whose weights have one type, and the script's tensors there.
  struct Chunk {
    at::ScalarType type = at::kFloat;
    std::int64_t begin = 0;  ///< First slot, in the memory of all turns.
    std::int64_t slots = 0;

    /// All slots' weights as one flat tensor of `type`: the script's values, zeros between them.
    /// The script's own memory where it is one tensor.
    [[nodiscard]] at::Tensor weights() const;
    /// Copy `slots` values of `type` to the script's tensors.
    void assign(const at::Tensor& values) const;

   private:
    friend class DeviceLayout;
    std::vector<at::Tensor> parts_;      // views of the script's tensors, in slot order
    std::vector<std::int64_t> at_;       // their slots, from begin
    std::vector<std::int64_t> padding_;  // zeros behind each
  };

  /// The script's tensors cut into chunks of bounded size (or one tensor), in slot order.
  [[nodiscard]] std::vector<Chunk> chunks(std::span<const plugins::TensorView> x,
                                          at::Device device) const;

 private:
  std::int64_t turns_;
  std::int64_t turn_;
  std::int64_t first_slot_;
  std::int64_t tiles_;
  std::vector<std::int64_t> slots_;    // by tensor, in the memory of all turns; -1: not in the turn
  std::vector<std::size_t> order_;     // tensors that are in the turn, by slot
  std::vector<std::int64_t> lengths_;  // by order: slots up to the next tensor
};

}  // namespace distro::c10d_backend
