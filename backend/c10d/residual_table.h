#pragma once

#include <ATen/ATen.h>

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "backend/c10d/recognition.h"
#include "plugins/gradient.h"

namespace distro::c10d_backend {

using Residuals = std::vector<std::shared_ptr<plugins::Residual>>;

/// Residuals of gradient reductions that come without a list of parameters (anything but DDP's
/// buckets). A reduction is known again by the variable whose gradient was accumulated last and by
/// how many have come from there in this backward; where autograd names no variable (FSDP2, final
/// callbacks) by its place in the backward alone. Thread-safe.
class ResidualTable {
 public:
  /// Number and residuals of a gradient reduction of so many inputs of so many elements each.
  std::pair<std::uint32_t, Residuals> own(const GradientPlace& place, std::size_t inputs,
                                          std::size_t elements);

  /// Residuals for a reduction which this rank took for an exact one, by the number that it has on
  /// a rank which knows it.
  Residuals adopted(std::uint32_t slot, std::size_t inputs, std::size_t elements);

 private:
  struct Key {
    const void* variable = nullptr;
    std::uint32_t occurrence = 0;
    std::size_t inputs = 0;
    std::size_t elements = 0;
    auto operator<=>(const Key&) const = default;
  };
  struct Entry {
    // Keeps the address of the variable from being given to another.
    c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> variable;
    std::uint32_t slot = 0;
    Residuals residuals;
  };

  std::uint32_t occurrence(int graph_task, const void* variable);

  std::mutex mutex_;
  // By backward and variable: reductions so far.
  std::map<int, std::map<const void*, std::uint32_t>> backwards_;
  std::uint32_t slots_ = 0;
  std::map<Key, Entry> entries_;
  std::map<std::tuple<std::uint32_t, std::size_t, std::size_t>, Residuals> adopted_;
};

/// So many new residuals.
Residuals new_residuals(std::size_t count);

}  // namespace distro::c10d_backend
