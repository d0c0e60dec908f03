#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "plugins/weights.h"

/// A module's weights on one simulated rank, and n ranks that exchange records in memory.
namespace distro::plugins {

/// What the script owns: tensors of any dtype, read and written as double.
class Module {
 public:
  struct Tensor {
    std::size_t elements = 0;
    kernels::DType dtype = kernels::DType::f32;
  };
  explicit Module(std::vector<Tensor> tensors);

  [[nodiscard]] std::vector<TensorView> views();
  [[nodiscard]] Geometry geometry(std::size_t turns = 1) const;
  [[nodiscard]] const std::vector<Tensor>& tensors() const noexcept { return tensors_; }
  [[nodiscard]] double get(std::size_t tensor, std::size_t i) const;
  void set(std::size_t tensor, std::size_t i, double value);
  /// Adds a number between -length and length, uniformly drawn, to every weight.
  void move(std::mt19937& random, double length);
  [[nodiscard]] const std::vector<std::vector<std::byte>>& bytes() const noexcept { return bytes_; }

 private:
  std::vector<Tensor> tensors_;
  std::vector<std::vector<std::byte>> bytes_;
};

/// Tensors of every kind: partial tiles, a pool of several tiles, 0-d, empty, all dtypes mixed.
std::vector<Module::Tensor> mixed_tensors();
/// The same sizes, all fp32.
std::vector<Module::Tensor> float_tensors();

/// What the ranks agree on.
struct Plan {
  std::size_t ranks = 4;
  int delay = 1;
  float gain = 2.0F;
  float share = 0.5F;
  std::size_t turns = 1;
  std::vector<kernels::Isa> isas{kernels::best_isa()};  ///< Rank i uses isas[i % size].
};

class Simulation {
 public:
  /// All ranks begin with the same random weights.
  Simulation(const std::vector<Module::Tensor>& tensors, WeightsConfig config, Plan plan);

  /// One step of every rank: a move of its own, then the sync point.
  void step(double length);
  /// Applies what is in flight (delay 1), without a new move.
  void drain();

  [[nodiscard]] std::size_t ranks() const noexcept { return modules.size(); }

  std::vector<Module> modules;
  std::vector<WeightsCodec> codecs;
  std::vector<Step> last;  ///< Each rank's last step.

 private:
  [[nodiscard]] std::vector<ParsedRecord> exchange() const;

  Plan plan_;
  std::uint64_t number_ = 0;
  std::mt19937 random_;
  std::vector<ParsedRecord> in_flight_;
};

/// Calls visit(tensor, element in the tensor, element in the flat order) for every weight, in the
/// flat order.
template <class Visit>
void for_each_weight(const Geometry& geometry, const Visit& visit) {
  for (const Tile& tile : geometry.tiles()) {
    for (const Segment& segment : geometry.segments(tile)) {
      geometry.for_each_stretch(segment, [&](std::size_t at, std::size_t j, std::size_t n) {
        for (std::size_t i = 0; i < n; ++i) {
          visit(segment.tensor, at + i, tile.begin + j + i);
        }
      });
    }
  }
}

/// The exchange of these records with equal weights.
std::vector<Contribution> equal_weights(std::span<const ParsedRecord> records);

}  // namespace distro::plugins
