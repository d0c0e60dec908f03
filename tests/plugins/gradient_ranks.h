#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "plugins/gradient.h"
#include "simulation.h"

/// Gradients of n simulated ranks that go through the codec in memory.
namespace distro::plugins {

struct GradientTensor {
  std::vector<std::int64_t> shape;
  kernels::DType dtype = kernels::DType::f32;
};

/// Whole and partial blocks, strips that share tiles, 0-d, empty, one dimension, convolutions,
/// prime and thin sides, all dtypes mixed.
std::vector<GradientTensor> gradient_tensors();

std::vector<std::vector<std::int64_t>> shapes_of(const std::vector<GradientTensor>& tensors);

/// One rank: its gradients, residuals and codec.
struct GradientRank {
  GradientRank(const std::vector<GradientTensor>& tensors, GradientConfig config);

  /// New gradients, normally distributed.
  void draw(std::mt19937& random, double deviation = 1.0);
  EncodedGradients encode();
  [[nodiscard]] std::vector<Residual*> residual_pointers();

  GradientCodec codec;
  Module gradients;
  std::vector<Residual> residuals;
};

/// What all ranks get from these records, as tensors like the first rank's gradients.
Module decode(const GradientCodec& codec, const Module& like,
              const std::vector<Contribution>& contributions,
              const std::vector<std::uint32_t>& non_finite = {});

/// The coefficients of a residual plus a gradient, all of them, in the residual's order: what a
/// codec that sends everything sends.
std::vector<std::vector<float>> all_coefficients(const std::vector<GradientTensor>& tensors,
                                                 GradientConfig config, const GradientRank& rank);

}  // namespace distro::plugins
