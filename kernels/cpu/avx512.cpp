#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels/cpu/isa.h"
#include "kernels/dct_basis.h"

namespace distro::kernels::avx512 {

#include "kernels/cpu/body.inc"

const KernelTable& kernel_table() noexcept {
  static constexpr KernelTable kTable{Isa::avx512, absorb,        derive,   restore, finite,
                                      adopt,       select,        checksum, move,    gather,
                                      scatter,     decay_and_add, signs,    dct,     inverse_dct};
  return kTable;
}

}  // namespace distro::kernels::avx512
