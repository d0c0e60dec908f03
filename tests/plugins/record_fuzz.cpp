// libFuzzer: any bytes are refused with RecordError, or make a record that keeps every promise of
// ParsedRecord.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <span>
#include <vector>

#include "plugins/geometry.h"
#include "plugins/gradient.h"
#include "plugins/gradient_layout.h"
#include "plugins/record_coder.h"

namespace {

using namespace distro::plugins;
namespace kernels = distro::kernels;

void check(bool promise) {
  if (!promise) {
    std::abort();
  }
}

void check_promises(const TileLayout& layout, const ParsedRecord& record) {
  check(record.first.size() == layout.tiles() + 1 && record.first.front() == 0);
  check(record.first.back() == record.index.size() && record.index.size() == record.value.size());
  for (std::size_t t = 0; t < layout.tiles(); ++t) {
    check(record.first[t] <= record.first[t + 1]);
    for (std::size_t i = record.first[t]; i < record.first[t + 1]; ++i) {
      check(record.index[i] < layout.tile_size(t));
      check(i == record.first[t] || record.index[i - 1] < record.index[i]);
      check(std::isfinite(record.value[i]));
    }
  }
}

constexpr std::uint32_t kKs[] = {6, 1, 409, 4096};

/// What both ends know: one of few, each made once.
struct Choice {
  bool small;
  bool whole_values;
  std::size_t k;

  explicit Choice(std::uint8_t byte)
      : small((byte & 1U) != 0), whole_values((byte & 2U) != 0), k((byte / 8) % std::size(kKs)) {}
  [[nodiscard]] RecordFormat format() const { return {kKs[k], whole_values ? 32U : 1U}; }
  [[nodiscard]] std::size_t number() const {
    return (k * 2 + (whole_values ? 1 : 0)) * 2 + (small ? 1 : 0);
  }
};
constexpr std::size_t kChoices = 4 * std::size(kKs);

template <class Made, class Make>
const Made& of_choice(const Choice& choice, const Make& make) {
  static std::array<std::unique_ptr<Made>, kChoices> made;
  std::unique_ptr<Made>& one = made[choice.number()];
  if (!one) {
    one = std::make_unique<Made>(make());
  }
  return *one;
}

struct Weights {
  Geometry geometry;
  RecordCoder coder;

  Weights(const std::vector<std::size_t>& elements, RecordFormat format)
      : geometry(elements), coder(geometry.layout(0), format) {}
};

void try_weights(const Choice& choice, std::span<const std::byte> body) {
  const auto& [geometry, coder] = of_choice<Weights>(choice, [&] {
    return Weights(choice.small ? std::vector<std::size_t>{100, 3}
                                : std::vector<std::size_t>{4096 * 17, 5000, 700, 0},
                   choice.format());
  });
  check_promises(geometry.layout(0), coder.parse(body));
}

struct Gradients {
  GradientLayout layout;
  GradientCodec codec;

  Gradients(const std::vector<std::vector<std::int64_t>>& shapes, RecordFormat format)
      : layout(shapes), codec(shapes, {GradientMethod::demo, format.k, format.value_bits}) {}
};

/// A record that is accepted can be decoded, too.
void try_gradients(const Choice& choice, std::span<const std::byte> body) {
  const auto& [layout, codec] = of_choice<Gradients>(choice, [&] {
    return Gradients(
        choice.small ? std::vector<std::vector<std::int64_t>>{{10, 9}, {}}
                     : std::vector<std::vector<std::int64_t>>{{130, 70}, {1003, 3}, {700}, {0, 4}},
        choice.format());
  });
  const ParsedRecord record = codec.parse(body);
  check_promises(layout.layout(), record);
  std::vector<std::vector<float>> memory;
  std::vector<TensorView> out;
  for (std::size_t tensor = 0; tensor < layout.tensors(); ++tensor) {
    memory.emplace_back(layout.tensor_elements(tensor));
    out.push_back({memory.back().data(), kernels::DType::f32, memory.back().size()});
  }
  const Contribution contributions[] = {{&record, 1.0F}};
  codec.decode(contributions, {}, out);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) {
    return 0;
  }
  // The first byte chooses what both ends know, and whether the rest is a whole body or the bits of
  // its only section.
  const std::uint8_t choice = data[0];
  const auto bytes = std::as_bytes(std::span(data, size)).subspan(1);
  std::vector<std::byte> body(bytes.begin(), bytes.end());
  if ((choice & 4U) != 0) {
    const auto length = static_cast<std::uint32_t>(body.size());
    const auto prefix = std::as_bytes(std::span(&length, 1));
    body.insert(body.begin(), prefix.begin(), prefix.end());
  }
  try {
    const auto attempt = (choice & 32U) != 0 ? try_gradients : try_weights;
    attempt(Choice(choice), body);
  } catch (const RecordError&) {
  }
  return 0;
}
