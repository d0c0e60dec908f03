#include "backend/c10d/residual_table.h"

namespace distro::c10d_backend {
namespace {

// Backwards whose reductions are counted. Several are open at once under reentrant checkpointing;
// one that is forgotten too early counts from 0 again.
constexpr std::size_t kBackwardsKept = 64;

}  // namespace

Residuals new_residuals(std::size_t count) {
  Residuals residuals;
  for (std::size_t i = 0; i < count; ++i) {
    residuals.push_back(std::make_shared<plugins::Residual>());
  }
  return residuals;
}

std::uint32_t ResidualTable::occurrence(int graph_task, const void* variable) {
  auto& counts = backwards_[graph_task];
  const auto number = counts[variable]++;
  if (backwards_.size() > kBackwardsKept) {
    backwards_.erase(backwards_.begin());
  }
  return number;
}

std::pair<std::uint32_t, Residuals> ResidualTable::own(const GradientPlace& place,
                                                       std::size_t inputs, std::size_t elements) {
  const void* variable = place.variable.defined() ? place.variable.unsafeGetTensorImpl() : nullptr;
  const std::lock_guard lock(mutex_);
  const Key key{variable, occurrence(place.graph_task, variable), inputs, elements};
  if (const auto found = entries_.find(key); found != entries_.end()) {
    return {found->second.slot, found->second.residuals};
  }
  std::erase_if(entries_, [](const auto& entry) {
    return entry.first.variable != nullptr && entry.second.variable.expired();
  });
  const auto added = entries_.emplace(
      key, Entry{c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(
                     place.variable.getIntrusivePtr()),
                 slots_++, new_residuals(inputs)});
  return {added.first->second.slot, added.first->second.residuals};
}

Residuals ResidualTable::adopted(std::uint32_t slot, std::size_t inputs, std::size_t elements) {
  const std::lock_guard lock(mutex_);
  auto& residuals = adopted_[{slot, inputs, elements}];
  if (residuals.empty()) {
    residuals = new_residuals(inputs);
  }
  return residuals;
}

}  // namespace distro::c10d_backend
