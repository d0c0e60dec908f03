#pragma once

#include <cstddef>
#include <cstdint>

namespace distro::transport {

/// Write an unsigned number, lowest byte first.
template <typename Unsigned>
void store_le(std::byte* out, Unsigned value) noexcept {
  for (std::size_t i = 0; i < sizeof(Unsigned); ++i) {
    out[i] = static_cast<std::byte>(value >> (8 * i));
  }
}

/// Read what store_le wrote.
template <typename Unsigned>
Unsigned load_le(const std::byte* in) noexcept {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < sizeof(Unsigned); ++i) {
    value |= std::to_integer<std::uint64_t>(in[i]) << (8 * i);
  }
  return static_cast<Unsigned>(value);
}

}  // namespace distro::transport
