#include "transport/frame.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>

#include "transport/little_endian.h"

namespace distro::transport {
namespace {

constexpr std::size_t kCheckOffset = 32;
constexpr std::size_t kCulpritBytes = 4;

// The header's own hash seeds the payload's, so that one check covers both without copying them
// together.
std::uint64_t check_of(const std::byte* header, std::span<const std::byte> payload) noexcept {
  const std::uint64_t seed = XXH3_64bits(header, kCheckOffset);
  return payload.empty() ? seed : XXH3_64bits_withSeed(payload.data(), payload.size(), seed);
}

std::string_view shape_error(const FrameHeader& header, std::span<const std::byte> bytes) noexcept {
  const std::size_t payload = bytes.size();
  const std::uint8_t allowed = header.kind == FrameKind::data  ? kFlagFirst | kFlagLast | kFlagHold
                               : header.kind == FrameKind::ack ? kFlagHold | kFlagAsk
                                                               : kFlagHold;
  if ((header.flags & ~allowed) != 0) {
    return "flags that its kind does not have";
  }
  if (!is_numbered(header.kind) && header.sequence != 0) {
    return "a sequence number on a kind that has none";
  }
  switch (header.kind) {
    case FrameKind::hello:
    case FrameKind::welcome:
      return payload == kGreetingBytes ? "" : "a greeting of the wrong size";
    case FrameKind::data:
      return "";
    case FrameKind::ack:
    case FrameKind::goodbye:
      return payload == 0 ? "" : "a payload on a kind that has none";
    case FrameKind::abort:
      return payload >= kCulpritBytes && payload <= kCulpritBytes + kMaxReasonBytes
                 ? ""
                 : "an abort of the wrong size";
    case FrameKind::skip:
      return payload == kSkipBytes && parse_skip(bytes) >= 1 && parse_skip(bytes) <= kMaxSkip
                 ? ""
                 : "a skip of the wrong size";
  }
  return "an unknown kind";
}

}  // namespace

bool is_numbered(FrameKind kind) noexcept {
  return kind == FrameKind::data || kind == FrameKind::goodbye || kind == FrameKind::skip;
}

FrameHeader parse_header(std::span<const std::byte> bytes) noexcept {
  const std::byte* p = bytes.data();
  FrameHeader header;
  header.kind = static_cast<FrameKind>(load_le<std::uint8_t>(p + 2));
  header.flags = load_le<std::uint8_t>(p + 3);
  header.session = load_le<std::uint64_t>(p + 8);
  header.sequence = load_le<std::uint64_t>(p + 16);
  header.ack = load_le<std::uint64_t>(p + 24);
  return header;
}

void encode_frame(const Frame& frame, std::span<std::byte> out) noexcept {
  std::byte* p = out.data();
  const FrameHeader& header = frame.header;
  store_le(p + 0, kMagic);
  store_le(p + 1, kProtocolVersion);
  store_le(p + 2, static_cast<std::uint8_t>(header.kind));
  store_le(p + 3, header.flags);
  store_le(p + 4, static_cast<std::uint32_t>(frame.payload.size()));
  store_le(p + 8, header.session);
  store_le(p + 16, header.sequence);
  store_le(p + 24, header.ack);
  store_le(p + kCheckOffset, check_of(p, frame.payload));
  if (!frame.payload.empty()) {
    std::memcpy(p + kHeaderBytes, frame.payload.data(), frame.payload.size());
  }
}

ParsedFrame parse_frame(std::span<const std::byte> bytes, std::size_t max_payload) noexcept {
  if (bytes.size() < kHeaderBytes) {
    return {std::nullopt, "shorter than a header"};
  }
  const std::byte* p = bytes.data();
  if (load_le<std::uint8_t>(p) != kMagic) {
    return {std::nullopt, "a wrong magic byte"};
  }
  if (load_le<std::uint8_t>(p + 1) != kProtocolVersion) {
    return {std::nullopt, "another version of the session protocol"};
  }
  const auto payload = bytes.subspan(kHeaderBytes);
  if (load_le<std::uint32_t>(p + 4) != payload.size()) {
    return {std::nullopt, "a payload size that differs from the bytes received"};
  }
  if (payload.size() > max_payload) {
    return {std::nullopt, "a payload larger than a chunk"};
  }
  if (load_le<std::uint64_t>(p + kCheckOffset) != check_of(p, payload)) {
    return {std::nullopt, "a wrong check"};
  }
  const Frame frame{parse_header(bytes), payload};
  if (const auto error = shape_error(frame.header, payload); !error.empty()) {
    return {std::nullopt, error};
  }
  return {frame, ""};
}

void encode_greeting(const Greeting& greeting, std::span<std::byte, kGreetingBytes> out) noexcept {
  std::byte* p = out.data();
  store_le(p + 0, greeting.min_version);
  store_le(p + 2, greeting.max_version);
  store_le(p + 4, greeting.rank);
  store_le(p + 8, greeting.world_size);
  store_le(p + 12, greeting.chunk_bytes);
  store_le(p + 16, greeting.group);
  store_le(p + 24, greeting.addressee);
}

Greeting parse_greeting(std::span<const std::byte> payload) noexcept {
  const std::byte* p = payload.data();
  Greeting greeting;
  greeting.min_version = load_le<std::uint16_t>(p + 0);
  greeting.max_version = load_le<std::uint16_t>(p + 2);
  greeting.rank = load_le<std::uint32_t>(p + 4);
  greeting.world_size = load_le<std::uint32_t>(p + 8);
  greeting.chunk_bytes = load_le<std::uint32_t>(p + 12);
  greeting.group = load_le<std::uint64_t>(p + 16);
  greeting.addressee = load_le<std::uint64_t>(p + 24);
  return greeting;
}

void encode_skip(std::uint32_t numbers, std::span<std::byte, kSkipBytes> out) noexcept {
  store_le(out.data(), numbers);
}

std::uint32_t parse_skip(std::span<const std::byte> payload) noexcept {
  return load_le<std::uint32_t>(payload.data());
}

std::string encode_abort(std::uint32_t culprit, std::string_view reason) {
  std::string payload(kCulpritBytes, '\0');
  for (std::size_t i = 0; i < kCulpritBytes; ++i) {
    payload[i] = static_cast<char>((culprit >> (8 * i)) & 0xFF);
  }
  payload += reason.substr(0, kMaxReasonBytes);
  return payload;
}

AbortNote parse_abort(std::span<const std::byte> payload) {
  AbortNote note;
  note.culprit = load_le<std::uint32_t>(payload.data());
  const auto text = payload.subspan(kCulpritBytes);
  note.reason.resize(text.size());
  std::transform(text.begin(), text.end(), note.reason.begin(), [](std::byte b) {
    const auto c = std::to_integer<unsigned char>(b);
    return c < 0x20 || c == 0x7F ? '?' : static_cast<char>(c);
  });
  return note;
}

}  // namespace distro::transport
