#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "plugins/tensor_view.h"

namespace distro::plugins {

/// Of so many parts of the weights a fingerprint takes one. More: a difference is found later;
/// fewer: each step reads more memory.
inline constexpr std::uint64_t kFingerprintParts = 16;

/// The part of each tensor that fingerprint `number` is about; in kFingerprintParts successive
/// numbers every element is in one.
[[nodiscard]] std::vector<TensorView> part_of(std::span<const TensorView> x, std::uint64_t number);

/// XXH3-64 over the bits of host memory: equal where all bits are, and hardly ever elsewhere.
[[nodiscard]] std::uint64_t fingerprint(std::span<const TensorView> x);

}  // namespace distro::plugins
