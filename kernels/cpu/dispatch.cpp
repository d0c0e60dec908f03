#include "kernels/cpu/isa.h"
#include "kernels/kernels.h"

namespace distro::kernels {

#if defined(DISTRO_KERNELS_X86)

namespace {

bool has_avx2() noexcept { return __builtin_cpu_supports("avx2") != 0; }

bool has_avx512() noexcept {
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
}

}  // namespace

const KernelTable& table(Isa isa) noexcept {
  if (isa == Isa::avx512 && has_avx512()) {
    return avx512::kernel_table();
  }
  if (isa == Isa::avx2 && has_avx2()) {
    return avx2::kernel_table();
  }
  return scalar::kernel_table();
}

Isa best_isa() noexcept {
  if (has_avx512()) {
    return Isa::avx512;
  }
  return has_avx2() ? Isa::avx2 : Isa::scalar;
}

#else

const KernelTable& table(Isa /*isa*/) noexcept { return scalar::kernel_table(); }

Isa best_isa() noexcept { return Isa::scalar; }

#endif

}  // namespace distro::kernels
