#pragma once

#include <vector>

#include "kernels/kernels.h"

namespace distro::kernels {

/// The instruction sets that this CPU has.
inline std::vector<Isa> isas() {
  std::vector<Isa> found;
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (table(isa).isa == isa) {
      found.push_back(isa);
    }
  }
  return found;
}

inline constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};

}  // namespace distro::kernels
