#include "plugins/module_codec.h"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

namespace distro::plugins {

Spread spread(float gain, std::uint32_t spread_steps, std::size_t turns) noexcept {
  const auto steps = static_cast<float>(spread_steps);
  return {spread_steps > 0 ? std::max(gain - 1.0F, 0.0F) : 0.0F,
          steps / (steps + static_cast<float>(turns))};
}

bool derives_residual(std::span<const TensorView> x, float share) noexcept {
  return share == 1.0F && std::ranges::all_of(x, [](const TensorView& tensor) {
           return kernels::size_of(tensor.dtype) >= sizeof(float);
         });
}

void check(const Geometry& geometry, std::span<const TensorView> x) {
  if (x.size() != geometry.tensors()) {
    throw std::invalid_argument(
        fmt::format("{} tensors given where the codec has {}", x.size(), geometry.tensors()));
  }
  for (std::size_t tensor = 0; tensor < x.size(); ++tensor) {
    const std::size_t expected = geometry.tensor_elements(tensor);
    if (x[tensor].elements != expected || (x[tensor].data == nullptr && expected > 0)) {
      throw std::invalid_argument(fmt::format(
          "tensor {} has {} elements{} where the codec has {}", tensor, x[tensor].elements,
          x[tensor].data == nullptr ? " at no address" : "", expected));
    }
  }
}

void check(const Geometry& geometry, const Due& due) {
  if (due.own >= due.contributions.size()) {
    throw std::invalid_argument(
        fmt::format("own contribution {} of {}", due.own, due.contributions.size()));
  }
  if (due.contributions[due.own].record == nullptr) {
    throw std::invalid_argument("the own contribution's record is missing");
  }
  for (const Contribution& contribution : due.contributions) {
    if (contribution.record == nullptr || contribution.record->turn != due.turn() ||
        contribution.record->turn >= geometry.turns() ||
        contribution.record->first.size() != geometry.tiles(due.turn()).size() + 1) {
      throw std::invalid_argument("a contribution's record is missing or of another geometry");
    }
  }
}

void check_state(const Geometry& geometry, const kernels::KernelTable& kernels, std::size_t tensor,
                 std::span<const float> reference, std::span<const float> residual,
                 std::span<const float> pending) {
  if (tensor >= geometry.tensors()) {
    throw std::invalid_argument(
        fmt::format("tensor {} where the codec has {}", tensor, geometry.tensors()));
  }
  const std::size_t n = geometry.tensor_elements(tensor);
  if (reference.size() != n || residual.size() != n || (!pending.empty() && pending.size() != n)) {
    throw std::invalid_argument(fmt::format(
        "tensor {} has {} weights; its saved state has {} and {}{}", tensor, n, reference.size(),
        residual.size(), pending.empty() ? "" : fmt::format(" and {}", pending.size())));
  }
  const auto finite = [&](std::span<const float> values) {
    return kernels.finite(kernels::DType::f32, values.data(), values.size());
  };
  if (!finite(reference) || !finite(residual) || !finite(pending)) {
    throw std::invalid_argument(fmt::format("the saved state of tensor {} is not finite", tensor));
  }
}

std::uint32_t kept_of_turn(std::uint32_t k, std::size_t turns) noexcept {
  const std::size_t kept = k * turns;
  return static_cast<std::uint32_t>(std::min(kept, kernels::kTileElements));
}

double mean_move(const Geometry& geometry, std::uint64_t number, double sum) noexcept {
  const auto elements =
      static_cast<double>(std::max<std::size_t>(geometry.elements(geometry.turn_of(number)), 1));
  const auto steps = static_cast<double>(std::clamp<std::uint64_t>(number, 1, geometry.turns()));
  return sum / elements / steps;
}

}  // namespace distro::plugins
