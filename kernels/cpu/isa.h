#pragma once

#include "kernels/kernels.h"

/// The tables of the instruction sets, each defined by its own compilation of body.inc.
namespace distro::kernels {

namespace scalar {
const KernelTable& kernel_table() noexcept;
}
namespace avx2 {
const KernelTable& kernel_table() noexcept;
}
namespace avx512 {
const KernelTable& kernel_table() noexcept;
}

}  // namespace distro::kernels
