#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "integration/emulator/packet.h"

namespace distro::emulator {

/// Memory for a fixed number of packets, taken once. The slot given back last is used next, so that
/// memory which is never needed is never touched.
class PacketPool {
 public:
  using Slot = std::uint32_t;

  explicit PacketPool(std::size_t capacity);

  /// A copy of a packet of at most kPacketBytes; nothing where no slot is free.
  std::optional<Slot> store(std::span<const std::byte> packet);
  [[nodiscard]] std::span<const std::byte> packet(Slot slot) const;
  void release(Slot slot) { free_.push_back(slot); }

  [[nodiscard]] std::size_t capacity() const noexcept { return sizes_.size(); }

 private:
  std::unique_ptr<std::byte[]> bytes_;
  std::vector<std::uint16_t> sizes_;
  std::vector<Slot> free_;
};

}  // namespace distro::emulator
