#include "plugins/fingerprint.h"

#include <xxhash.h>

namespace distro::plugins {

std::vector<TensorView> part_of(std::span<const TensorView> x, std::uint64_t number) {
  const std::size_t part = number % kFingerprintParts;
  std::vector<TensorView> result;
  result.reserve(x.size());
  for (const TensorView& tensor : x) {
    const std::size_t begin = tensor.elements * part / kFingerprintParts;
    const std::size_t end = tensor.elements * (part + 1) / kFingerprintParts;
    result.push_back({address(tensor, begin), tensor.dtype, end - begin});
  }
  return result;
}

std::uint64_t fingerprint(std::span<const TensorView> x) {
  std::uint64_t hash = 0;
  for (const TensorView& tensor : x) {
    if (tensor.elements > 0) {
      hash =
          XXH3_64bits_withSeed(tensor.data, tensor.elements * kernels::size_of(tensor.dtype), hash);
    }
  }
  return hash;
}

}  // namespace distro::plugins
