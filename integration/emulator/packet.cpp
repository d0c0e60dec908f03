#include "integration/emulator/packet.h"

namespace distro::emulator {
namespace {

constexpr std::size_t kHeaderBytes = 20;
constexpr std::uint8_t kIcmp = 1;
constexpr std::uint8_t kTcp = 6;
constexpr std::uint8_t kUdp = 17;

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : bytes_(bytes) {}

  [[nodiscard]] std::uint8_t u8(std::size_t at) const {
    return std::to_integer<std::uint8_t>(bytes_[at]);
  }
  [[nodiscard]] std::uint16_t u16(std::size_t at) const {
    return static_cast<std::uint16_t>((u8(at) << 8) | u8(at + 1));
  }
  [[nodiscard]] std::uint32_t u32(std::size_t at) const {
    return (std::uint32_t{u16(at)} << 16) | u16(at + 2);
  }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace

std::optional<Flow> parse(std::span<const std::byte> packet) {
  if (packet.size() < kHeaderBytes || packet.size() > kPacketBytes) {
    return std::nullopt;
  }
  const Reader read(packet);
  const std::size_t header = std::size_t{read.u8(0) & 0x0fU} * 4;
  if (read.u8(0) >> 4 != 4 || header < kHeaderBytes || header > packet.size() ||
      read.u16(2) != packet.size()) {
    return std::nullopt;
  }
  Flow flow{.source = read.u32(12), .destination = read.u32(16), .protocol = read.u8(9)};
  // Of a packet in fragments only the first has ports.
  const bool begins = (read.u16(6) & 0x1fffU) == 0;
  const bool has_ports = flow.protocol == kTcp || flow.protocol == kUdp;
  if (begins && has_ports && packet.size() >= header + 4) {
    flow.source_port = read.u16(header);
    flow.destination_port = read.u16(header + 2);
  }
  if (begins && flow.protocol == kIcmp && packet.size() >= header + 8) {
    flow.source_port = flow.destination_port = read.u16(header + 4);
  }
  return flow;
}

}  // namespace distro::emulator
