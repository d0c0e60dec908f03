#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "backend/exchange/transfer_message.h"

// Whatever a peer sends is either refused with an EnvelopeError or opens to what is written as the
// same bytes.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace distro::exchange;
  const auto input = std::as_bytes(std::span(data, size));
  try {
    const auto opened = open_transfer(input);
    const auto again = write_transfer(
        opened.header, opened.description ? &*opened.description : nullptr, opened.payload);
    if (!std::equal(again.begin(), again.end(), input.begin(), input.end())) {
      __builtin_trap();
    }
  } catch (const EnvelopeError&) {
    return 0;
  }
  return 0;
}
