#include "simulation.h"

#include <utility>

#include "tests/kernels/elements.h"

namespace distro::plugins {

using kernels::DType;

Module::Module(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {
  for (const Tensor& tensor : tensors_) {
    bytes_.emplace_back(tensor.elements * kernels::size_of(tensor.dtype));
  }
}

std::vector<TensorView> Module::views() {
  std::vector<TensorView> views;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    views.push_back({bytes_[i].data(), tensors_[i].dtype, tensors_[i].elements});
  }
  return views;
}

Geometry Module::geometry(std::size_t turns) const {
  std::vector<std::size_t> elements;
  for (const Tensor& tensor : tensors_) {
    elements.push_back(tensor.elements);
  }
  return Geometry(elements, turns);
}

double Module::get(std::size_t tensor, std::size_t i) const {
  return kernels::get(tensors_[tensor].dtype, bytes_[tensor].data(), i);
}

void Module::set(std::size_t tensor, std::size_t i, double value) {
  kernels::put(tensors_[tensor].dtype, bytes_[tensor].data(), i, value);
}

void Module::move(std::mt19937& random, double length) {
  const double unit = length / 2147483648.0;
  for (std::size_t tensor = 0; tensor < tensors_.size(); ++tensor) {
    for (std::size_t i = 0; i < tensors_[tensor].elements; ++i) {
      set(tensor, i, get(tensor, i) + unit * static_cast<std::int32_t>(random()));
    }
  }
}

std::vector<Module::Tensor> mixed_tensors() {
  return {{4096 * 3 + 5, DType::f32}, {768, DType::f32}, {0, DType::f32},     {1, DType::f64},
          {5000, DType::bf16},        {900, DType::f16}, {4096, DType::f16},  {3000, DType::bf16},
          {4099, DType::f64},         {17, DType::f32},  {70000, DType::f32}, {1, DType::f16}};
}

std::vector<Module::Tensor> float_tensors() {
  std::vector<Module::Tensor> tensors = mixed_tensors();
  for (Module::Tensor& tensor : tensors) {
    tensor.dtype = DType::f32;
  }
  return tensors;
}

std::vector<Contribution> equal_weights(std::span<const ParsedRecord> records) {
  std::vector<Contribution> contributions;
  for (const ParsedRecord& record : records) {
    contributions.push_back({&record, 1.0F / static_cast<float>(records.size())});
  }
  return contributions;
}

Simulation::Simulation(const std::vector<Module::Tensor>& tensors, WeightsConfig config, Plan plan)
    : plan_(std::move(plan)), random_(7) {
  Module first(tensors);
  first.move(random_, 1.0);
  for (std::size_t rank = 0; rank < plan_.ranks; ++rank) {
    modules.push_back(first);
    config.isa = plan_.isas[rank % plan_.isas.size()];
    codecs.emplace_back(first.geometry(plan_.turns), config);
    codecs.back().begin(modules.back().views());
  }
  last.resize(plan_.ranks);
}

std::vector<ParsedRecord> Simulation::exchange() const {
  std::vector<ParsedRecord> records;
  for (std::size_t rank = 0; rank < ranks(); ++rank) {
    records.push_back(codecs[rank].parse(last[rank].record, number_));
  }
  return records;
}

void Simulation::step(double length) {
  for (Module& module : modules) {
    module.move(random_, length);
  }
  ++number_;
  if (plan_.delay == 0) {
    for (std::size_t rank = 0; rank < ranks(); ++rank) {
      last[rank] = codecs[rank].encode(modules[rank].views(), number_, plan_.share);
    }
    in_flight_ = exchange();
    drain();
    return;
  }
  const std::vector<Contribution> contributions = equal_weights(in_flight_);
  for (std::size_t rank = 0; rank < ranks(); ++rank) {
    const Due due{contributions, rank, plan_.gain};
    last[rank] =
        codecs[rank].advance(modules[rank].views(), number_, in_flight_.empty() ? nullptr : &due,
                             plan_.share, plan_.share);
  }
  in_flight_ = exchange();
}

void Simulation::drain() {
  const std::vector<Contribution> contributions = equal_weights(in_flight_);
  for (std::size_t rank = 0; rank < ranks(); ++rank) {
    codecs[rank].settle(modules[rank].views(), {contributions, rank, plan_.gain}, plan_.share);
  }
  in_flight_.clear();
}

}  // namespace distro::plugins
