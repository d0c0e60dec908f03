#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace distro::c10d_backend {

/// The largest entries of each tile of R on a device, as keys. A key orders the entries of a tile
/// as the codec in host memory does, by magnitude and then by the lower index, and holds all that a
/// record needs of an entry: bits 13 to 43 the magnitude of R as fp32 bits, 1 to 12 the index
/// counted from the tile's end, 0 the sign. No two keys are equal, so any top-k gives the same
/// entries.
class DeviceSelection {
 public:
  /// `kept`: entries of a tile of 4096.
  DeviceSelection(std::uint32_t kept, at::Device device);

  /// [tiles, kept] int64, the largest first, of the fp32 values of whole tiles, [tiles * 4096].
  [[nodiscard]] at::Tensor keys(const at::Tensor& residual) const;

  struct Entry {
    std::uint16_t index;  ///< In the tile.
    float value;          ///< 0: no entry.
  };
  [[nodiscard]] static Entry entry(std::int64_t key) noexcept;

 private:
  std::int64_t kept_;
  at::Tensor lane_;  // [4096] int64: a key's part that says which entry of the tile
};

}  // namespace distro::c10d_backend
