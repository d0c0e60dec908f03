// Any bytes: parsing neither crashes nor reads outside them, and what is accepted encodes to the
// same bytes again.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "transport/channel.h"
#include "transport/frame.h"
#include "transport/session.h"

namespace {

using namespace distro::transport;

// More only takes longer: the session has been through all its states by then.
constexpr int kMostFrames = 64;

// The check makes random bytes useless: also try them as the fields of a frame whose check is
// right.
void try_session(std::span<const std::byte> bytes) {
  ChannelConfig config;
  config.chunk_bytes = 64;
  config.window_bytes = 1024;
  config.max_message_bytes = 4096;
  Session session(config, 1, 2);
  Deadline now{};
  session.connected({FrameKind::welcome, 0, 2, 0, 0}, now);
  session.queue(std::make_shared<const Bytes>(500));
  for (int frames = 0; frames < kMostFrames && bytes.size() >= 5; ++frames) {
    const auto at = [&](std::size_t i) { return std::to_integer<std::uint8_t>(bytes[i]); };
    FrameHeader header{static_cast<FrameKind>(at(0) % 8), static_cast<std::uint8_t>(at(1) % 16), 2,
                       at(2), at(3)};
    const std::size_t size = std::min<std::size_t>(at(4) % 80, bytes.size() - 5);
    std::vector<std::byte> frame(kHeaderBytes + size);
    encode_frame({header, bytes.subspan(5, size)}, frame);
    bytes = bytes.subspan(5 + size);
    const auto parsed = parse_frame(frame, config.chunk_bytes);
    const auto kind = header.kind;
    if (!parsed.frame) {
      continue;
    }
    if (kind == FrameKind::abort) {
      parse_abort(parsed.frame->payload);
    } else if (kind == FrameKind::hello || kind == FrameKind::welcome) {
      parse_greeting(parsed.frame->payload);
    } else if (session.accept(*parsed.frame, now) == Verdict::violation) {
      return;
    }
    now += std::chrono::milliseconds(7);
    while (session.take()) {
    }
    while (const auto out = session.next_frame(now)) {
      session.sent(*out, now);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
  if (const auto parsed = parse_frame(bytes, 1 << 16); parsed.frame) {
    std::vector<std::byte> again(size);
    encode_frame(*parsed.frame, again);
    if (!std::equal(again.begin(), again.end(), bytes.begin())) {
      std::abort();
    }
  }
  try_session(bytes);
  return 0;
}
