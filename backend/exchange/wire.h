#pragma once

#include <bit>
#include <cstddef>
#include <cstring>

namespace distro::exchange {

// The layout of messages is little-endian; a big-endian port has to swap in put() and get().
static_assert(std::endian::native == std::endian::little);

/// Write a value of a fixed size, and go on behind it.
template <typename Value>
void put(std::byte*& out, Value value) noexcept {
  std::memcpy(out, &value, sizeof value);
  out += sizeof value;
}

/// Read what put() wrote.
template <typename Value>
[[nodiscard]] Value get(const std::byte*& in) noexcept {
  Value value;
  std::memcpy(&value, in, sizeof value);
  in += sizeof value;
  return value;
}

}  // namespace distro::exchange
