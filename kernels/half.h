#pragma once

#include <cstdint>

/// The two 16-bit formats, as bits. Rounding is to nearest, ties to even; overflow gives infinity;
/// a NaN stays a NaN (quiet, sign and upper payload kept); subnormals are kept whatever the FTZ and
/// DAZ modes of the thread.
namespace distro::kernels {

[[nodiscard]] std::uint16_t to_f16(float value) noexcept;
[[nodiscard]] float from_f16(std::uint16_t bits) noexcept;
[[nodiscard]] std::uint16_t to_bf16(float value) noexcept;
[[nodiscard]] float from_bf16(std::uint16_t bits) noexcept;

}  // namespace distro::kernels
