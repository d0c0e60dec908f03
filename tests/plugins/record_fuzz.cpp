// libFuzzer: any bytes are refused with RecordError, or make a record that keeps every promise of
// ParsedRecord.
#include <cmath>
#include <cstdint>
#include <cstdlib>
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

void try_weights(RecordFormat format, bool small, std::span<const std::byte> body) {
  const Geometry geometry(small ? std::vector<std::size_t>{100, 3}
                                : std::vector<std::size_t>{4096 * 17, 5000, 700, 0});
  check_promises(geometry.layout(0), RecordCoder(geometry.layout(0), format).parse(body));
}

/// A record that is accepted can be decoded, too.
void try_gradients(RecordFormat format, bool small, std::span<const std::byte> body) {
  const std::vector<std::vector<std::int64_t>> shapes =
      small ? std::vector<std::vector<std::int64_t>>{{10, 9}, {}}
            : std::vector<std::vector<std::int64_t>>{{200, 130}, {5003, 3}, {700}, {0, 4}};
  const GradientLayout layout(shapes);
  const GradientCodec codec(shapes, {GradientMethod::demo, format.k, format.value_bits});
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
  const std::uint32_t ks[] = {6, 1, 409, 4096};
  const RecordFormat format{ks[(choice / 8) % 4], (choice & 2U) != 0 ? 32U : 1U};
  const auto bytes = std::as_bytes(std::span(data, size)).subspan(1);
  std::vector<std::byte> body(bytes.begin(), bytes.end());
  if ((choice & 4U) != 0) {
    const auto length = static_cast<std::uint32_t>(body.size());
    const auto prefix = std::as_bytes(std::span(&length, 1));
    body.insert(body.begin(), prefix.begin(), prefix.end());
  }
  try {
    const auto attempt = (choice & 32U) != 0 ? try_gradients : try_weights;
    attempt(format, (choice & 1U) != 0, body);
  } catch (const RecordError&) {
  }
  return 0;
}
