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

DeviceLayout::DeviceLayout(const plugins::Geometry& geometry, std::size_t turn,
                           std::int64_t first_slot)
    : turns_(static_cast<std::int64_t>(geometry.turns())),
      turn_(static_cast<std::int64_t>(turn)),
      first_slot_(first_slot),
      tiles_(static_cast<std::int64_t>(geometry.tiles(turn).size())),
      slots_(geometry.tensors(), -1) {
  for (std::int64_t tile = 0; tile < tiles_; ++tile) {
    for (const auto& segment :
         geometry.segments(geometry.tiles(turn)[static_cast<std::size_t>(tile)])) {
      if (slots_[segment.tensor] < 0) {
        slots_[segment.tensor] =
            first_slot + tile * kTile + static_cast<std::int64_t>(segment.tile_begin);
        order_.push_back(segment.tensor);
      }
    }
  }
  for (std::size_t i = 0; i < order_.size(); ++i) {
    const std::int64_t end = i + 1 < order_.size() ? slots_[order_[i + 1]] : first_slot + slots();
    lengths_.push_back(end - slots_[order_[i]]);
  }
}

std::int64_t DeviceLayout::slots() const noexcept { return tiles_ * kTile; }

std::vector<at::Tensor> DeviceLayout::parts(const at::Tensor& flat) const {
  if (turns_ == 1) {
    return flat.numel() == 0 ? std::vector<at::Tensor>{} : std::vector{flat};
  }
  constexpr auto kStretch = static_cast<std::int64_t>(plugins::kTurnElements);
  const std::int64_t round = turns_ * kStretch;
  const std::int64_t rounds = flat.numel() / round;
  const std::int64_t rest = flat.numel() % round - turn_ * kStretch;
  std::vector<at::Tensor> parts;
  if (rounds > 0) {
    parts.push_back(
        flat.narrow(0, 0, rounds * round).view({rounds, turns_, kStretch}).select(1, turn_));
  }
  if (rest > 0) {
    parts.push_back(flat.narrow(0, rounds * round + turn_ * kStretch, std::min(rest, kStretch)));
  }
  return parts;
}

void DeviceLayout::take(std::size_t tensor, const at::Tensor& slots,
                        const at::Tensor& values) const {
  std::int64_t slot = slots_[tensor];
  for (at::Tensor& part : parts(values)) {
    part.copy_(slots.narrow(0, slot, part.numel()).view(part.sizes()));
    slot += part.numel();
  }
}

void DeviceLayout::put(std::size_t tensor, const at::Tensor& values,
                       const at::Tensor& slots) const {
  std::int64_t slot = slots_[tensor];
  for (const at::Tensor& part : parts(values)) {
    slots.narrow(0, slot, part.numel()).view(part.sizes()).copy_(part);
    slot += part.numel();
  }
}

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
    std::int64_t left = lengths_[i];
    for (at::Tensor& part : parts(tensor_of(view, device))) {
      chunk.at_.push_back(slot - chunk.begin + lengths_[i] - left);
      chunk.padding_.push_back(0);
      left -= part.numel();
      chunk.parts_.push_back(std::move(part));
    }
    chunk.padding_.back() = left;
    chunk.slots += lengths_[i];
  }
  return chunks;
}

at::Tensor DeviceLayout::Chunk::weights() const {
  if (parts_.size() == 1 && padding_.front() == 0) {
    return parts_.front().reshape({-1});
  }
  // Stretches are rows: where there is nothing else, one kernel gathers many tensors, and none has
  // to be made contiguous by one of its own.
  constexpr auto kStretch = static_cast<std::int64_t>(plugins::kTurnElements);
  const bool rows = std::ranges::all_of(parts_, [](const at::Tensor& p) { return p.dim() == 2; }) &&
                    std::ranges::all_of(padding_, [](auto n) { return n % kStretch == 0; });
  const std::vector<std::int64_t> shape =
      rows ? std::vector<std::int64_t>{-1, kStretch} : std::vector<std::int64_t>{-1};
  const std::int64_t row = rows ? kStretch : 1;
  const at::Tensor zeros =
      at::zeros({*std::ranges::max_element(padding_)}, parts_[0].options()).view(shape);
  std::vector<at::Tensor> pieces;
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    pieces.push_back(rows ? parts_[i] : parts_[i].reshape(shape));
    if (padding_[i] > 0) {
      pieces.push_back(zeros.narrow(0, 0, padding_[i] / row));
    }
  }
  return at::cat(pieces).view({-1});
}

void DeviceLayout::Chunk::assign(const at::Tensor& values) const {
  std::vector<at::Tensor> sources;
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    sources.push_back(values.narrow(0, at_[i], parts_[i].numel()).view(parts_[i].sizes()));
  }
  at::_foreach_copy_(parts_, sources);
}

}  // namespace distro::c10d_backend
