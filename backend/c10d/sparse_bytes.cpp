#include "backend/c10d/sparse_bytes.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace distro::c10d_backend {

namespace {

// An index of each sparse dimension, and a value of the dense ones.
std::size_t bytes_of_entry(const at::Tensor& like) {
  auto bytes = static_cast<std::size_t>(like.element_size());
  for (const std::int64_t size : like.sizes().slice(static_cast<std::size_t>(like.sparse_dim()))) {
    bytes *= static_cast<std::size_t>(size);
  }
  return bytes + static_cast<std::size_t>(like.sparse_dim()) * sizeof(std::int64_t);
}

}  // namespace

std::size_t most_sparse_bytes(const at::Tensor& like) {
  // Coalesced: one entry for each place, at most.
  std::size_t entries = 1;
  for (const std::int64_t size :
       like.sizes().slice(0, static_cast<std::size_t>(like.sparse_dim()))) {
    entries *= static_cast<std::size_t>(size);
  }
  return sizeof(std::uint64_t) + entries * bytes_of_entry(like);
}

std::vector<std::byte> sparse_bytes(const at::Tensor& tensor) {
  const at::NoGradGuard no_grad;
  const at::Tensor coalesced = tensor.detach().coalesce();
  const at::Tensor indices = coalesced.indices().contiguous();
  const at::Tensor values = coalesced.values().contiguous();
  const auto entries = static_cast<std::uint64_t>(indices.size(1));
  std::vector<std::byte> bytes(sizeof entries + indices.nbytes() + values.nbytes());
  std::byte* out = bytes.data();
  const auto put = [&](const void* from, std::size_t size) {
    if (size > 0) {
      std::memcpy(out, from, size);
      out += size;
    }
  };
  put(&entries, sizeof entries);
  put(indices.const_data_ptr(), indices.nbytes());
  put(values.const_data_ptr(), values.nbytes());
  return bytes;
}

at::Tensor sparse_tensor(std::span<const std::byte> bytes, const at::Tensor& like) {
  std::uint64_t entries = 0;
  TORCH_CHECK_VALUE(bytes.size() >= sizeof entries, "too short for a sparse tensor");
  std::memcpy(&entries, bytes.data(), sizeof entries);
  bytes = bytes.subspan(sizeof entries);

  const std::int64_t sparse = like.sparse_dim();
  std::vector<std::int64_t> shape(like.sizes().begin() + sparse, like.sizes().end());
  const std::size_t entry_bytes = bytes_of_entry(like);
  TORCH_CHECK_VALUE(
      entry_bytes == 0 ? bytes.empty() && entries <= 1
                       : bytes.size() % entry_bytes == 0 && bytes.size() / entry_bytes == entries,
      "announces ", entries, " entries of ", entry_bytes, " bytes, has ", bytes.size(), " bytes");
  const auto count = static_cast<std::int64_t>(entries);
  shape.insert(shape.begin(), count);
  at::Tensor indices = at::empty({sparse, count}, at::kLong);
  at::Tensor values = at::empty(shape, like.scalar_type());
  if (indices.nbytes() > 0) {
    std::memcpy(indices.mutable_data_ptr(), bytes.data(), indices.nbytes());
  }
  if (values.nbytes() > 0) {
    std::memcpy(values.mutable_data_ptr(), bytes.data() + indices.nbytes(), values.nbytes());
  }
  for (std::int64_t dimension = 0; dimension < sparse && count > 0; ++dimension) {
    const at::Tensor row = indices[dimension];
    TORCH_CHECK_VALUE(row.min().item<std::int64_t>() >= 0 &&
                          row.max().item<std::int64_t>() < like.size(dimension),
                      "an index of dimension ", dimension, " is out of range");
  }
  return at::_sparse_coo_tensor_unsafe(indices, values, like.sizes(), like.options()).coalesce();
}

}  // namespace distro::c10d_backend
