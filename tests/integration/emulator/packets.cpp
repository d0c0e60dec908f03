#include "tests/integration/emulator/packets.h"

namespace distro::emulator::test {
namespace {

void put(Packet& packet, std::size_t at, std::uint32_t value, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; ++i) {
    packet[at + i] = static_cast<std::byte>(value >> (8 * (bytes - 1 - i)));
  }
}

}  // namespace

Packet packet_of(const Flow& flow, std::size_t size, std::uint8_t mark) {
  Packet packet(size);
  put(packet, 0, 0x45, 1);
  put(packet, 2, static_cast<std::uint32_t>(size), 2);
  put(packet, 9, flow.protocol, 1);
  put(packet, 12, flow.source, 4);
  put(packet, 16, flow.destination, 4);
  if (flow.protocol == kIcmp) {
    put(packet, 24, flow.source_port, 2);
  } else {
    put(packet, 20, flow.source_port, 2);
    put(packet, 22, flow.destination_port, 2);
  }
  packet.back() = static_cast<std::byte>(mark);
  return packet;
}

}  // namespace distro::emulator::test
