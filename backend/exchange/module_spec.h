#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "backend/exchange/options.h"
#include "kernels/kernels.h"

namespace distro::exchange {

/// One trainable parameter, as all ranks must have it.
struct TensorSpec {
  std::string name;
  kernels::DType dtype = kernels::DType::f32;
  std::vector<std::int64_t> shape;

  [[nodiscard]] std::size_t elements() const noexcept;
};

/// A line for each tensor: name, dtype, shape; whole lines up to `most` bytes.
std::string describe(std::span<const TensorSpec> tensors, std::size_t most);

/// XXH3-64 of the description and of the options that shape a record: equal on ranks that can
/// exchange this module.
std::uint64_t geometry_hash(std::span<const TensorSpec> tensors, const Options& options);

/// Number of elements of each tensor.
std::vector<std::size_t> element_counts(std::span<const TensorSpec> tensors);

/// Bytes of all gradients in the tensors' own dtypes.
std::uint64_t gradient_bytes(std::span<const TensorSpec> tensors);

/// Where the descriptions of these ranks first differ, such as "where rank 0 has a.weight float32
/// [3], rank 2 has nothing"; empty if they are the same. Of bounded length, whatever they hold.
std::string first_difference(const std::map<int, std::string>& descriptions);

}  // namespace distro::exchange
