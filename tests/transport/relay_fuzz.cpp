// Any bytes: parsing a message of a relay neither crashes nor reads outside it, and what is
// accepted is made to the same bytes again.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "transport/relay_frame.h"

namespace {

using namespace distro::transport;

zmq::message_t make_again(const RelayMessage& message) {
  switch (message.kind) {
    case RelayKind::join:
      return make_join(message.group, message.member);
    case RelayKind::leave:
      return make_leave();
    case RelayKind::forward:
      return make_forward(message.others, message.rest);
    case RelayKind::deliver:
      return make_deliver(message.member, message.rest);
    case RelayKind::refused:
      return make_refused(
          {reinterpret_cast<const char*>(message.rest.data()), message.rest.size()});
    default:
      return make_notice(message.kind, message.member);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
  static_cast<void>(version_of_join(bytes));
  if (const auto parsed = parse_relay_message(bytes); parsed.message) {
    const auto again = make_again(*parsed.message);
    if (!std::equal(bytes.begin(), bytes.end(), again.data<std::byte>(),
                    again.data<std::byte>() + again.size())) {
      std::abort();
    }
  }
  return 0;
}
