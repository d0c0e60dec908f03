#include "backend/c10d/device_selection.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "kernels/kernels.h"

namespace distro::c10d_backend {
namespace {

constexpr auto kTile = static_cast<std::int64_t>(kernels::kTileElements);

constexpr int kMagnitudeShift = 13;
constexpr int kIndexShift = 1;
constexpr std::int64_t kMagnitudeMask = 0x7fffffff;

// Tiles selected at a time: 16 bytes of temporaries a weight.
constexpr std::int64_t kSelectTiles = 2048;

}  // namespace

DeviceSelection::DeviceSelection(std::uint32_t kept, at::Device device)
    : kept_(kept),
      lane_(at::arange(kTile - 1, -1, -1, at::TensorOptions().device(device).dtype(at::kLong))
                .mul_(1 << kIndexShift)) {}

at::Tensor DeviceSelection::keys(const at::Tensor& residual) const {
  const std::int64_t all = residual.numel() / kTile;
  std::vector<at::Tensor> keys;
  for (std::int64_t tile = 0; tile < all; tile += kSelectTiles) {
    const std::int64_t tiles = std::min(kSelectTiles, all - tile);
    const at::Tensor bits =
        residual.narrow(0, tile * kTile, tiles * kTile).view({tiles, kTile}).view(at::kInt);
    at::Tensor key = bits.bitwise_and(kMagnitudeMask).to(at::kLong);
    key.mul_(std::int64_t{1} << kMagnitudeShift).add_(lane_).add_(bits.lt(0));
    keys.push_back(std::get<0>(key.topk(kept_, /*dim=*/1, /*largest=*/true, /*sorted=*/true)));
  }
  return keys.empty() ? at::empty({0, kept_}, lane_.options()) : at::cat(keys);
}

DeviceSelection::Entry DeviceSelection::entry(std::int64_t key) noexcept {
  const auto bits = static_cast<std::uint64_t>(key);
  const auto magnitude = static_cast<std::uint32_t>(bits >> kMagnitudeShift);
  const auto from_end = static_cast<std::uint16_t>((bits >> kIndexShift) & (kTile - 1));
  return {static_cast<std::uint16_t>(kTile - 1 - from_end),
          std::bit_cast<float>(magnitude | static_cast<std::uint32_t>(bits & 1U) << 31)};
}

}  // namespace distro::c10d_backend
