#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <span>
#include <vector>

namespace distro::c10d_backend {

/// A sparse (COO) tensor in host memory as bytes: the number of its entries (u64), their indices
/// (int64, one dimension after the other), their values.
[[nodiscard]] std::vector<std::byte> sparse_bytes(const at::Tensor& tensor);

/// How many bytes a tensor of the shape and type of `like` has at most.
[[nodiscard]] std::size_t most_sparse_bytes(const at::Tensor& like);

/// The tensor of such bytes, of the shape and type of `like`, coalesced. The bytes are a peer's:
/// throws c10::Error if they are of anything else.
[[nodiscard]] at::Tensor sparse_tensor(std::span<const std::byte> bytes, const at::Tensor& like);

}  // namespace distro::c10d_backend
