// libFuzzer: any bytes are refused with RecordError, or make a record that keeps every promise of
// ParsedRecord.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "plugins/geometry.h"
#include "plugins/record_coder.h"

namespace {

using distro::plugins::Geometry;
using distro::plugins::ParsedRecord;
using distro::plugins::RecordCoder;

void check(bool promise) {
  if (!promise) {
    std::abort();
  }
}

void try_parse(const Geometry& geometry, distro::plugins::RecordFormat format,
               std::span<const std::byte> body) {
  const RecordCoder coder(geometry.layout(), format);
  ParsedRecord record;
  try {
    record = coder.parse(body);
  } catch (const distro::plugins::RecordError&) {
    return;
  }
  check(record.first.size() == geometry.tiles().size() + 1 && record.first.front() == 0);
  check(record.first.back() == record.index.size() && record.index.size() == record.value.size());
  for (std::size_t t = 0; t < geometry.tiles().size(); ++t) {
    check(record.first[t] <= record.first[t + 1]);
    for (std::size_t i = record.first[t]; i < record.first[t + 1]; ++i) {
      check(record.index[i] < geometry.tiles()[t].elements);
      check(i == record.first[t] || record.index[i - 1] < record.index[i]);
      check(std::isfinite(record.value[i]));
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) {
    return 0;
  }
  // The first byte chooses what both ends know, and whether the rest is a whole body or the bits of
  // its only section.
  const std::uint8_t choice = data[0];
  const std::size_t small[] = {100, 3};
  const std::size_t large[] = {4096 * 17, 5000, 700, 0};
  const std::uint32_t ks[] = {6, 1, 409, 4096};
  const std::span<const std::size_t> shape =
      (choice & 1U) != 0 ? std::span<const std::size_t>(small) : large;
  const std::uint32_t value_bits = (choice & 2U) != 0 ? 32 : 1;

  const auto bytes = std::as_bytes(std::span(data, size)).subspan(1);
  std::vector<std::byte> body(bytes.begin(), bytes.end());
  if ((choice & 4U) != 0) {
    const auto length = static_cast<std::uint32_t>(body.size());
    const auto prefix = std::as_bytes(std::span(&length, 1));
    body.insert(body.begin(), prefix.begin(), prefix.end());
  }
  try_parse(Geometry(shape), {ks[(choice / 8) % 4], value_bits}, body);
  return 0;
}
