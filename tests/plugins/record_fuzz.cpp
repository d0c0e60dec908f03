// libFuzzer: any bytes are refused with RecordError, or make a record that keeps every promise of
// ParsedRecord.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "plugins/weights_record.h"

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
  const RecordCoder coder(geometry, format);
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
  const std::size_t small[] = {100, 3};
  const std::size_t large[] = {4096 * 17, 5000, 700, 0};
  const std::size_t many[70] = {};
  const auto body = std::as_bytes(std::span(data, size)).subspan(1);
  const std::uint8_t choice = data[0];
  const std::uint32_t ks[] = {6, 1, 409, 4096};
  const std::span<const std::size_t> shapes[] = {small, large, many};
  try_parse(Geometry(shapes[choice % 3]), {ks[(choice / 4) % 4], (choice & 64U) != 0 ? 32U : 1U},
            body);
  return 0;
}
