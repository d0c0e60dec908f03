#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace distro::plugins {

/// A record body that is not what the codec writes. The message says what is wrong; the caller adds
/// whose it is.
class RecordError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// One participant's entries, unpacked and checked: every index is inside its tile and ascending,
/// every value is finite.
struct ParsedRecord {
  /// Entries of tile t: [first[t], first[t + 1]).
  std::vector<std::uint32_t> first;
  std::vector<std::uint16_t> index;  ///< Within the tile.
  std::vector<float> value;          ///< q.
  std::size_t turn = 0;              ///< Whose tiles they are of.

  /// The entries of one tile.
  [[nodiscard]] std::span<const std::uint16_t> indices(std::size_t tile) const noexcept {
    return std::span(index).subspan(first[tile], first[tile + 1] - first[tile]);
  }
  [[nodiscard]] std::span<const float> values(std::size_t tile) const noexcept {
    return std::span(value).subspan(first[tile], first[tile + 1] - first[tile]);
  }
};

/// One participant's record in an exchange, with its weight (its share of all ranks; all weights
/// sum to 1).
struct Contribution {
  const ParsedRecord* record = nullptr;
  float weight = 0.0F;
};

}  // namespace distro::plugins
