#include "backend/c10d/device_layout.h"

#include <algorithm>

#include "backend/c10d/tensors.h"

namespace distro::c10d_backend {
namespace {

constexpr auto kTile = static_cast<std::int64_t>(kernels::kTileElements);

// Slots of a chunk: each takes up to 16 bytes of temporaries on the device. Fewer means more
// launches for the same work.
constexpr std::int64_t kChunkSlots = std::int64_t{1} << 24;

}  // namespace

DeviceLayout::DeviceLayout(const plugins::Geometry& geometry)
    : tiles_(static_cast<std::int64_t>(geometry.tiles().size())), slots_(geometry.tensors()) {
  for (std::int64_t tile = 0; tile < tiles_; ++tile) {
    for (const auto& segment :
         geometry.segments(geometry.tiles()[static_cast<std::size_t>(tile)])) {
      if (segment.tensor_begin == 0) {
        slots_[segment.tensor] = tile * kTile + static_cast<std::int64_t>(segment.tile_begin);
        order_.push_back(segment.tensor);
      }
    }
  }
  for (std::size_t i = 0; i < order_.size(); ++i) {
    const std::int64_t end = i + 1 < order_.size() ? slots_[order_[i + 1]] : slots();
    lengths_.push_back(end - slots_[order_[i]]);
  }
}

std::int64_t DeviceLayout::slots() const noexcept { return tiles_ * kTile; }

std::vector<DeviceLayout::Chunk> DeviceLayout::chunks(std::span<const plugins::TensorView> x,
                                                      at::Device device) const {
  std::vector<Chunk> chunks;
  for (std::size_t i = 0; i < order_.size(); ++i) {
    const auto& view = x[order_[i]];
    const at::ScalarType type = scalar_type(view.dtype);
    const std::int64_t slot = slots_[order_[i]];
    if (chunks.empty() || chunks.back().type != type ||
        chunks.back().slots + lengths_[i] > kChunkSlots) {
      Chunk& fresh = chunks.emplace_back();
      fresh.type = type;
      fresh.begin = slot;
    }
    Chunk& chunk = chunks.back();
    chunk.tensors_.push_back(tensor_of(view, device));
    chunk.at_.push_back(slot - chunk.begin);
    chunk.padding_.push_back(lengths_[i] - chunk.tensors_.back().numel());
    chunk.slots += lengths_[i];
  }
  return chunks;
}

at::Tensor DeviceLayout::Chunk::weights() const {
  if (tensors_.size() == 1 && padding_.front() == 0) {
    return tensors_.front();
  }
  const at::Tensor zeros = at::zeros({*std::ranges::max_element(padding_)}, tensors_[0].options());
  std::vector<at::Tensor> parts;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    parts.push_back(tensors_[i]);
    if (padding_[i] > 0) {
      parts.push_back(zeros.narrow(0, 0, padding_[i]));
    }
  }
  return at::cat(parts);
}

void DeviceLayout::Chunk::assign(const at::Tensor& values) const {
  std::vector<at::Tensor> sources;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    sources.push_back(values.narrow(0, at_[i], tensors_[i].numel()));
  }
  at::_foreach_copy_(tensors_, sources);
}

}  // namespace distro::c10d_backend
