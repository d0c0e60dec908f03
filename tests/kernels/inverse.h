#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace distro::kernels {

/// The block of the coefficients that are not zero.
inline std::vector<float> inverse_dct(const KernelTable& kernels,
                                      const std::vector<float>& coefficients, std::size_t rows,
                                      std::size_t columns) {
  std::vector<std::uint16_t> index;
  std::vector<float> entries;
  for (std::size_t i = 0; i < coefficients.size(); ++i) {
    if (coefficients[i] != 0.0F) {
      index.push_back(static_cast<std::uint16_t>(i));
      entries.push_back(coefficients[i]);
    }
  }
  std::vector<float> block(coefficients.size());
  kernels.inverse_dct(index.data(), entries.data(), index.size(), block.data(), rows, columns);
  return block;
}

}  // namespace distro::kernels
