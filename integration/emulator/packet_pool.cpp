#include "integration/emulator/packet_pool.h"

#include <algorithm>
#include <numeric>

namespace distro::emulator {

PacketPool::PacketPool(std::size_t capacity)
    : bytes_(std::make_unique_for_overwrite<std::byte[]>(capacity * kPacketBytes)),
      sizes_(capacity),
      free_(capacity) {
  std::iota(free_.rbegin(), free_.rend(), Slot{0});
}

std::optional<PacketPool::Slot> PacketPool::store(std::span<const std::byte> packet) {
  if (free_.empty()) {
    return std::nullopt;
  }
  const Slot slot = free_.back();
  free_.pop_back();
  std::copy(packet.begin(), packet.end(), bytes_.get() + slot * kPacketBytes);
  sizes_[slot] = static_cast<std::uint16_t>(packet.size());
  return slot;
}

std::span<const std::byte> PacketPool::packet(Slot slot) const {
  return {bytes_.get() + slot * kPacketBytes, sizes_[slot]};
}

}  // namespace distro::emulator
