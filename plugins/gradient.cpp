#include "plugins/gradient.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

#include "plugins/float_environment.h"
#include "plugins/gradient_layout.h"
#include "plugins/gradient_tile.h"
#include "plugins/parallel.h"
#include "plugins/record_coder.h"

namespace distro::plugins {
namespace {

// Results from this size on are written past the caches: they are more than a core's own hold, and
// whoever reads them comes when all buckets are there.
constexpr std::size_t kStreamedBytes = std::size_t{4} << 20;

kernels::Store how_to_store(std::span<const TensorView> tensors) {
  std::size_t bytes = 0;
  for (const TensorView& tensor : tensors) {
    bytes += tensor.elements * kernels::size_of(tensor.dtype);
  }
  return bytes < kStreamedBytes ? kernels::Store::cached : kernels::Store::streamed;
}

}  // namespace

struct GradientCodec::State {
  State(std::span<const std::vector<std::int64_t>> shapes, GradientConfig how)
      : config(how),
        layout(shapes),
        kernels(kernels::table(how.isa)),
        coder(layout.layout(), {how.k, how.value_bits}),
        finite(layout.layout().runs().size()),
        staging(coder.staging_bytes()),
        bits(layout.layout().runs().size()) {
    if (!(how.beta >= 0.0F && how.beta <= 1.0F)) {
      throw std::invalid_argument(fmt::format("beta is {}; allowed: 0 to 1", how.beta));
    }
  }

  void check(std::span<const TensorView> tensors) const;
  void check(std::span<const Contribution> contributions) const;
  void check(std::span<const std::uint32_t> non_finite) const;
  void check(std::span<Residual* const> residuals, bool or_empty) const;
  [[nodiscard]] std::vector<std::uint32_t> find_non_finite(std::span<const TensorView> gradients);
  /// Runs task(run) for every run of tiles.
  template <class Task>
  void for_each_run(const Task& task) const;
  /// The tensor that a run of tiles belongs to.
  [[nodiscard]] std::size_t tensor_of(const TileRun& run) const {
    return layout.tiles()[run.first_tile].tensor;
  }
  void subtract(OwnRecord& own, std::span<Residual* const> residuals) const;

  GradientConfig config;
  GradientLayout layout;
  const kernels::KernelTable& kernels;
  RecordCoder coder;
  // Of one encode(), kept so that it allocates what it returns only.
  std::vector<std::uint8_t> finite;  // by run
  std::vector<std::byte> staging;
  std::vector<std::size_t> bits;  // by run
};

void GradientCodec::State::check(std::span<const TensorView> tensors) const {
  if (tensors.size() != layout.tensors()) {
    throw std::invalid_argument(
        fmt::format("{} tensors given where the codec has {}", tensors.size(), layout.tensors()));
  }
  for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
    const std::size_t expected = layout.tensor_elements(tensor);
    if (tensors[tensor].elements != expected || (tensors[tensor].data == nullptr && expected > 0)) {
      throw std::invalid_argument(fmt::format(
          "tensor {} has {} elements{} where the codec has {}", tensor, tensors[tensor].elements,
          tensors[tensor].data == nullptr ? " at no address" : "", expected));
    }
  }
}

void GradientCodec::State::check(std::span<const Contribution> contributions) const {
  for (const Contribution& contribution : contributions) {
    if (contribution.record == nullptr ||
        contribution.record->first.size() != layout.tiles().size() + 1) {
      throw std::invalid_argument("a contribution's record is missing or of other tensors");
    }
  }
}

void GradientCodec::State::check(std::span<const std::uint32_t> non_finite) const {
  for (std::size_t i = 0; i < non_finite.size(); ++i) {
    if (non_finite[i] >= layout.tensors() || (i > 0 && non_finite[i] <= non_finite[i - 1])) {
      throw std::invalid_argument(
          fmt::format("non-finite tensor {} does not ascend or is not one of {}", non_finite[i],
                      layout.tensors()));
    }
  }
}

void GradientCodec::State::check(std::span<Residual* const> residuals, bool or_empty) const {
  if (residuals.size() != layout.tensors()) {
    throw std::invalid_argument(fmt::format("{} residuals given where the codec has {} tensors",
                                            residuals.size(), layout.tensors()));
  }
  for (std::size_t tensor = 0; tensor < residuals.size(); ++tensor) {
    const std::size_t expected = layout.tensor_elements(tensor);
    const std::size_t given =
        residuals[tensor] == nullptr ? 0 : residuals[tensor]->coefficients.size();
    if (residuals[tensor] == nullptr || (given != expected && !(or_empty && given == 0))) {
      throw std::invalid_argument(
          fmt::format("the residual of tensor {} has {} values where the "
                      "tensor has {} elements",
                      tensor, given, expected));
    }
  }
}

template <class Task>
void GradientCodec::State::for_each_run(const Task& task) const {
  parallel_for(layout.layout().runs().size(), [&](std::size_t run) {
    const DefaultFloatEnvironment environment;
    task(run);
  });
}

std::vector<std::uint32_t> GradientCodec::State::find_non_finite(
    std::span<const TensorView> gradients) {
  const std::span<const TileRun> runs = layout.layout().runs();
  for_each_run([&](std::size_t run) {
    // A tile has as many elements as values: taken in memory order, tiles cover the tensor too.
    const auto tiles = layout.tiles(runs[run]);
    finite[run] = std::all_of(tiles.begin(), tiles.end(), [&](const GradientTile& tile) {
      const TensorView& gradient = gradients[tile.tensor];
      return kernels.finite(gradient.dtype, address(gradient, tile.begin), tile.elements);
    });
  });
  std::vector<std::uint32_t> bad;
  for (std::size_t run = 0; run < runs.size(); ++run) {
    const auto tensor = static_cast<std::uint32_t>(tensor_of(runs[run]));
    if (finite[run] == 0 && (bad.empty() || bad.back() != tensor)) {
      bad.push_back(tensor);
    }
  }
  return bad;
}

void GradientCodec::State::subtract(OwnRecord& own, std::span<Residual* const> residuals) const {
  own.before.resize(own.value.size());
  for_each_run([&](std::size_t run) {
    const TileRun& tiles = layout.layout().runs()[run];
    for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
      const GradientTile& tile = layout.tiles()[t];
      float* const m = residuals[tile.tensor]->coefficients.data() + tile.begin;
      for (std::size_t i = own.first[t]; i < own.first[t + 1]; ++i) {
        float& value = m[own.index[i]];
        own.before[i] = value;
        value -= own.value[i];
      }
    }
  });
}

GradientCodec::GradientCodec(std::vector<std::vector<std::int64_t>> shapes, GradientConfig config)
    : state_(std::make_unique<State>(shapes, config)) {}
GradientCodec::~GradientCodec() = default;
GradientCodec::GradientCodec(GradientCodec&&) noexcept = default;
GradientCodec& GradientCodec::operator=(GradientCodec&&) noexcept = default;

std::size_t GradientCodec::tensors() const noexcept { return state_->layout.tensors(); }

std::size_t GradientCodec::tensor_elements(std::size_t tensor) const noexcept {
  return state_->layout.tensor_elements(tensor);
}

EncodedGradients GradientCodec::encode(std::span<const TensorView> gradients,
                                       std::span<Residual* const> residuals) const {
  State& state = *state_;
  state.check(gradients);
  state.check(residuals, true);
  for (std::size_t tensor = 0; tensor < residuals.size(); ++tensor) {
    residuals[tensor]->coefficients.resize(tensor_elements(tensor));
  }
  EncodedGradients encoded;
  encoded.non_finite = state.find_non_finite(gradients);

  state.for_each_run([&](std::size_t run) {
    const TileRun& tiles = state.layout.layout().runs()[run];
    const std::size_t tensor = state.tensor_of(tiles);
    const bool finite = !std::binary_search(encoded.non_finite.begin(), encoded.non_finite.end(),
                                            static_cast<std::uint32_t>(tensor));
    RunWriter writer = state.coder.writer(run, state.staging);
    std::array<std::uint16_t, kernels::kTileElements> index{};
    EncodeScratch scratch;
    for (const GradientTile& tile : state.layout.tiles(tiles)) {
      float* const m = residuals[tensor]->coefficients.data() + tile.begin;
      std::size_t count = 0;
      if (finite) {
        absorb_gradient(state.kernels, state.config, state.layout.blocks(tile), gradients[tensor],
                        m, scratch);
        count = state.kernels.select(m, tile.elements,
                                     TileLayout::kept(state.config.k, tile.elements), index.data());
      }
      writer.add(std::span(index).first(count), m);
    }
    state.bits[run] = writer.finish();
  });
  encoded.record = state.coder.assemble(state.staging, state.bits);
  static_cast<ParsedRecord&>(encoded.own) = state.coder.parse(encoded.record);
  state.subtract(encoded.own, residuals);
  return encoded;
}

ParsedRecord GradientCodec::parse(std::span<const std::byte> body) const {
  return state_->coder.parse(body);
}

void GradientCodec::decode(std::span<const Contribution> contributions,
                           std::span<const std::uint32_t> non_finite,
                           std::span<const TensorView> out) const {
  const State& state = *state_;
  state.check(contributions);
  state.check(non_finite);
  state.check(out);
  const kernels::Store how = how_to_store(out);
  state.for_each_run([&](std::size_t run) {
    const TileRun& tiles = state.layout.layout().runs()[run];
    const std::size_t tensor = state.tensor_of(tiles);
    const bool finite = !std::binary_search(non_finite.begin(), non_finite.end(),
                                            static_cast<std::uint32_t>(tensor));
    DecodeScratch scratch;
    for (std::size_t t = tiles.first_tile; t < tiles.first_tile + tiles.tiles; ++t) {
      const std::span<const GradientBlock> blocks = state.layout.blocks(state.layout.tiles()[t]);
      if (finite) {
        decode_tile(state.kernels, state.config, blocks, t, contributions, out[tensor], how,
                    scratch);
      } else {
        fill_nan(state.kernels, blocks, out[tensor]);
      }
    }
  });
}

void GradientCodec::take_back(const OwnRecord& own, std::span<const std::uint32_t> non_finite,
                              std::span<Residual* const> residuals) const {
  const State& state = *state_;
  const Contribution contribution{&own, 1.0F};
  state.check(std::span(&contribution, 1));
  if (own.before.size() != own.value.size()) {
    throw std::invalid_argument("what the residuals were before is not known");
  }
  state.check(non_finite);
  state.check(residuals, false);
  for (std::size_t t = 0; t < state.layout.tiles().size(); ++t) {
    const GradientTile& tile = state.layout.tiles()[t];
    if (!std::binary_search(non_finite.begin(), non_finite.end(),
                            static_cast<std::uint32_t>(tile.tensor))) {
      continue;
    }
    float* const m = residuals[tile.tensor]->coefficients.data() + tile.begin;
    for (std::size_t i = own.first[t]; i < own.first[t + 1]; ++i) {
      m[own.index[i]] = own.before[i];
    }
  }
}

}  // namespace distro::plugins
