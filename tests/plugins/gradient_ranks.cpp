#include "gradient_ranks.h"

#include "plugins/gradient_layout.h"

namespace distro::plugins {

using kernels::DType;

std::vector<GradientTensor> gradient_tensors() {
  return {{{128, 192}, DType::f32},
          {{200, 130}, DType::bf16},
          {{768}, DType::f16},
          {{}, DType::f32},
          {{5, 0, 3}, DType::f32},
          {{64, 3, 7, 7}, DType::f64},
          {{5003, 3}, DType::f32},
          {{9001}, DType::f64},
          {{1, 197, 1, 61}, DType::f16},
          {{2, 4099}, DType::bf16},
          {{1}, DType::f64},
          {{64, 64}, DType::f32},
          {{32, 16, 3, 3}, DType::f32}};
}

std::vector<std::vector<std::int64_t>> shapes_of(const std::vector<GradientTensor>& tensors) {
  std::vector<std::vector<std::int64_t>> shapes;
  shapes.reserve(tensors.size());
  for (const GradientTensor& tensor : tensors) {
    shapes.push_back(tensor.shape);
  }
  return shapes;
}

namespace {

Module memory_for(const std::vector<GradientTensor>& tensors) {
  std::vector<Module::Tensor> memory;
  for (const GradientTensor& tensor : tensors) {
    std::size_t elements = 1;
    for (const std::int64_t n : tensor.shape) {
      elements *= static_cast<std::size_t>(n);
    }
    memory.push_back({elements, tensor.dtype});
  }
  return Module(memory);
}

}  // namespace

GradientRank::GradientRank(const std::vector<GradientTensor>& tensors, GradientConfig config)
    : codec(shapes_of(tensors), config),
      gradients(memory_for(tensors)),
      residuals(tensors.size()) {}

void GradientRank::draw(std::mt19937& random, double deviation) {
  std::normal_distribution<double> normal(0.0, deviation);
  for (std::size_t tensor = 0; tensor < gradients.tensors().size(); ++tensor) {
    for (std::size_t i = 0; i < gradients.tensors()[tensor].elements; ++i) {
      gradients.set(tensor, i, normal(random));
    }
  }
}

std::vector<Residual*> GradientRank::residual_pointers() {
  std::vector<Residual*> pointers;
  for (Residual& residual : residuals) {
    pointers.push_back(&residual);
  }
  return pointers;
}

EncodedGradients GradientRank::encode() {
  return codec.encode(gradients.views(), residual_pointers());
}

Module decode(const GradientCodec& codec, const Module& like,
              const std::vector<Contribution>& contributions,
              const std::vector<std::uint32_t>& non_finite) {
  Module out(like.tensors());
  codec.decode(contributions, non_finite, out.views());
  return out;
}

std::vector<std::vector<float>> all_coefficients(const std::vector<GradientTensor>& tensors,
                                                 GradientConfig config, const GradientRank& rank) {
  config.k = 4096;
  config.value_bits = 32;
  GradientRank everything(tensors, config);
  everything.gradients = rank.gradients;
  everything.residuals = rank.residuals;
  const EncodedGradients encoded = everything.encode();
  const GradientLayout layout(shapes_of(tensors));
  std::vector<std::vector<float>> coefficients;
  for (std::size_t tensor = 0; tensor < layout.tensors(); ++tensor) {
    coefficients.emplace_back(layout.tensor_elements(tensor));
  }
  for (std::size_t t = 0; t < layout.tiles().size(); ++t) {
    const GradientTile& tile = layout.tiles()[t];
    for (std::size_t i = encoded.own.first[t]; i < encoded.own.first[t + 1]; ++i) {
      coefficients[tile.tensor][tile.begin + encoded.own.index[i]] = encoded.own.value[i];
    }
  }
  return coefficients;
}

}  // namespace distro::plugins
