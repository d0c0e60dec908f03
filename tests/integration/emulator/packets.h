#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "integration/emulator/packet.h"

namespace distro::emulator::test {

using Packet = std::vector<std::byte>;

/// An IPv4 packet of this flow, `size` bytes with its headers; `mark` is its last byte.
Packet packet_of(const Flow& flow, std::size_t size, std::uint8_t mark = 0);

constexpr std::uint8_t kUdp = 17;
constexpr std::uint8_t kTcp = 6;
constexpr std::uint8_t kIcmp = 1;

}  // namespace distro::emulator::test
