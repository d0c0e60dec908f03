#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/exchange/envelope.h"
#include "backend/exchange/reduction_message.h"

// Whatever a peer sends is either refused with an EnvelopeError or opens to what seals to the same
// bytes.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace distro::exchange;
  const auto input = std::as_bytes(std::span(data, size));
  try {
    const auto opened = open(input);
    if (const auto again = seal(opened.envelope, opened.body);
        !std::equal(again.begin(), again.end(), input.begin(), input.end())) {
      __builtin_trap();
    }
  } catch (const EnvelopeError&) {
    // The check makes this the rule: so also open the input as the body of a well sealed message.
  }
  const auto message = seal(
      {.kind = static_cast<MessageKind>(size % 7), .flags = static_cast<std::uint16_t>(size % 9)},
      input);
  try {
    const auto opened = open(message);
    if (opened.envelope.kind == MessageKind::reduction) {
      static_cast<void>(read_reduction(opened, 100));
    }
  } catch (const EnvelopeError&) {
    return 0;
  }
  return 0;
}
