#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels/cpu/isa.h"
#include "kernels/dct_basis.h"
#include "kernels/half.h"

namespace distro::kernels {
namespace scalar {

#include "kernels/cpu/body.inc"

const KernelTable& kernel_table() noexcept {
  static constexpr KernelTable kTable{Isa::scalar, absorb,        derive,   restore, finite,
                                      adopt,       select,        checksum, move,    gather,
                                      scatter,     decay_and_add, signs,    dct,     inverse_dct};
  return kTable;
}

}  // namespace scalar

std::uint64_t mix(std::uint64_t index, float value) noexcept {
  return scalar::mix_one(index, value);
}

std::uint16_t to_f16(float value) noexcept { return scalar::F16::store(value); }
float from_f16(std::uint16_t bits) noexcept { return scalar::F16::load(bits); }
std::uint16_t to_bf16(float value) noexcept { return scalar::Bf16::store(value); }
float from_bf16(std::uint16_t bits) noexcept { return scalar::Bf16::load(bits); }

}  // namespace distro::kernels
