#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace distro::emulator {

/// Since the epoch of the steady clock, or of a test's own.
using Time = std::chrono::nanoseconds;

/// IPv4, in the host's byte order.
using Address = std::uint32_t;

/// Largest packet that is carried; interfaces have a smaller MTU.
constexpr std::size_t kPacketBytes = 1536;

/// Who talks to whom: what a home router tells connections apart by.
struct Flow {
  Address source = 0;
  Address destination = 0;
  std::uint16_t source_port = 0;       ///< Of an ICMP echo: its identifier.
  std::uint16_t destination_port = 0;  ///< 0 where the protocol has no ports.
  std::uint8_t protocol = 0;

  bool operator==(const Flow&) const = default;

  /// The same as its answers see it.
  [[nodiscard]] Flow reversed() const {
    return {destination, source, destination_port, source_port, protocol};
  }
};

/// The flow of an IPv4 packet; nothing where it is none or its lengths do not fit.
std::optional<Flow> parse(std::span<const std::byte> packet);

}  // namespace distro::emulator
