#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/exchange/module_spec.h"
#include "plugins/gradient.h"

namespace distro::exchange {

/// One all-reduce or reduce-scatter that every rank of the group submits, in the same order: a
/// gradient reduction, or one that looks like it (right type, operator and size) and is not.
///
/// Callbacks run on the engine's thread and must not wait for it.
struct Reduction {
  /// Collective and operator, such as "all-reduce SUM"; the same on all ranks.
  std::string what;
  /// Not a gradient reduction on this rank: it runs exactly if no rank says otherwise.
  bool exact = false;
  /// Reduce-scatter: tensors[0] describes a slice, `input` has one slice for each rank, `output` is
  /// this rank's. Else `input` and `output` are the tensors' memory, each dense, read and
  /// overwritten.
  bool scatter = false;
  std::vector<TensorSpec> tensors;
  std::vector<plugins::TensorView> input;
  std::vector<plugins::TensorView> output;
  /// Weight of each rank's input in the result: 1 / ranks for the mean, 1 for the sum.
  float weight = 1.0F;
  /// Which of this rank's residuals belong to it (told to ranks that announced an exact reduction).
  std::uint32_t slot = 0;
  /// Residuals, one for each of `input`; `slot` is this rank's own, or that of the rank which
  /// knows.
  std::function<std::vector<std::shared_ptr<plugins::Residual>>(std::uint32_t slot)> residuals;
  /// Run it exactly, as all ranks do now; sees to its completion by itself. If it throws, the
  /// engine calls `complete`.
  std::function<void()> run_exact;
  /// Called once with nothing when `output` is written, or with the failure; must not throw.
  std::function<void(std::exception_ptr)> complete;
};

}  // namespace distro::exchange
