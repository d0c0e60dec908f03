#include "transport/relay_frame.h"

#include <algorithm>
#include <cstring>

#include "transport/channel.h"
#include "transport/little_endian.h"

namespace distro::transport {
namespace {

// Offsets of the header: magic, version, kind, zero, then 32 bits by kind (a member, or a count).
constexpr std::size_t kVersionOffset = 1;
constexpr std::size_t kKindOffset = 2;
constexpr std::size_t kZeroOffset = 3;
constexpr std::size_t kNumberOffset = 4;
constexpr std::size_t kGroupBytes = 8;

zmq::message_t make(RelayKind kind, std::uint32_t number, std::size_t more) {
  zmq::message_t message(kRelayHeaderBytes + more);
  auto* const p = message.data<std::byte>();
  store_le(p, kRelayMagic);
  store_le(p + kVersionOffset, kRelayVersion);
  store_le(p + kKindOffset, static_cast<std::uint8_t>(kind));
  store_le(p + kZeroOffset, std::uint8_t{0});
  store_le(p + kNumberOffset, number);
  return message;
}

void append(zmq::message_t& message, std::size_t offset, std::span<const std::byte> bytes) {
  if (!bytes.empty()) {
    std::memcpy(message.data<std::byte>() + offset, bytes.data(), bytes.size());
  }
}

void append(zmq::message_t& message, std::span<const std::uint16_t> members) {
  auto* p = message.data<std::byte>() + kRelayHeaderBytes;
  for (const std::uint16_t member : members) {
    store_le(p, member);
    p += sizeof member;
  }
}

// The numbers of a FORWARD; what follows them becomes `rest`. False if there are not so
// many, or they are not ascending.
bool take_members(RelayMessage& message, std::uint32_t count) {
  if (count > kMaxGroup || message.rest.size() < count * sizeof(std::uint16_t)) {
    return false;
  }
  message.others.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const auto member = load_le<std::uint16_t>(message.rest.data() + i * sizeof(std::uint16_t));
    if (member > kMaxMember || (i > 0 && member <= message.others.back())) {
      return false;
    }
    message.others.push_back(member);
  }
  message.rest = message.rest.subspan(count * sizeof(std::uint16_t));
  return true;
}

std::string_view fill(RelayMessage& message, std::uint32_t number) {
  switch (message.kind) {
    case RelayKind::join:
      if (number > kMaxMember || message.rest.size() != kGroupBytes) {
        return "a JOIN of the wrong size";
      }
      message.member = number;
      message.group = load_le<std::uint64_t>(message.rest.data());
      return "";
    case RelayKind::forward:
      if (number == kEveryone) {
        message.everyone = true;
        return message.rest.empty() ? "a FORWARD of nothing" : "";
      }
      return take_members(message, number) && !message.others.empty() && !message.rest.empty()
                 ? ""
                 : "a FORWARD whose members are none, or too many, or not ascending";
    case RelayKind::deliver:
      message.member = number;
      return number <= kMaxMember && !message.rest.empty() ? "" : "a DELIVER of the wrong size";
    case RelayKind::present:
    case RelayKind::absent:
      message.member = number;
      return number <= kMaxMember && message.rest.empty() ? "" : "a notice of the wrong size";
    case RelayKind::joined:
    case RelayKind::leave:
    case RelayKind::ping:
      return number == 0 && message.rest.empty() ? "" : "a payload on a kind that has none";
    case RelayKind::refused:
      return number == 0 && message.rest.size() <= kMaxRefusalBytes ? ""
                                                                    : "a REFUSED of the wrong size";
  }
  return "an unknown kind";
}

}  // namespace

ParsedRelayMessage parse_relay_message(std::span<const std::byte> bytes) {
  if (bytes.size() < kRelayHeaderBytes) {
    return {std::nullopt, "shorter than a relay's header"};
  }
  const std::byte* const p = bytes.data();
  if (load_le<std::uint8_t>(p) != kRelayMagic) {
    return {std::nullopt, "a wrong magic byte"};
  }
  if (load_le<std::uint8_t>(p + kVersionOffset) != kRelayVersion) {
    return {std::nullopt, "another version of the relay's protocol"};
  }
  if (load_le<std::uint8_t>(p + kZeroOffset) != 0) {
    return {std::nullopt, "a byte that is to be zero and is not"};
  }
  RelayMessage message;
  message.kind = static_cast<RelayKind>(load_le<std::uint8_t>(p + kKindOffset));
  message.rest = bytes.subspan(kRelayHeaderBytes);
  if (const auto error = fill(message, load_le<std::uint32_t>(p + kNumberOffset)); !error.empty()) {
    return {std::nullopt, error};
  }
  return {std::move(message), ""};
}

std::optional<std::uint8_t> version_of_join(std::span<const std::byte> bytes) noexcept {
  if (bytes.size() != kRelayHeaderBytes + kGroupBytes ||
      load_le<std::uint8_t>(bytes.data()) != kRelayMagic ||
      load_le<std::uint8_t>(bytes.data() + kKindOffset) !=
          static_cast<std::uint8_t>(RelayKind::join)) {
    return std::nullopt;
  }
  return load_le<std::uint8_t>(bytes.data() + kVersionOffset);
}

zmq::message_t make_join(std::uint64_t group, std::uint32_t member) {
  auto message = make(RelayKind::join, member, kGroupBytes);
  store_le(message.data<std::byte>() + kRelayHeaderBytes, group);
  return message;
}

zmq::message_t make_leave() { return make(RelayKind::leave, 0, 0); }

zmq::message_t make_forward(std::span<const std::uint16_t> members,
                            std::span<const std::byte> frame) {
  const auto count = members.empty() ? kEveryone : static_cast<std::uint32_t>(members.size());
  auto message = make(RelayKind::forward, count, members.size_bytes() + frame.size());
  append(message, members);
  append(message, kRelayHeaderBytes + members.size_bytes(), frame);
  return message;
}

zmq::message_t make_notice(RelayKind kind, std::uint32_t member) { return make(kind, member, 0); }

zmq::message_t make_deliver(std::uint32_t member, std::span<const std::byte> frame) {
  auto message = make(RelayKind::deliver, member, frame.size());
  append(message, kRelayHeaderBytes, frame);
  return message;
}

zmq::message_t make_refused(std::string_view reason) {
  const auto text = reason.substr(0, kMaxRefusalBytes);
  auto message = make(RelayKind::refused, 0, text.size());
  append(message, kRelayHeaderBytes, std::as_bytes(std::span(text)));
  return message;
}

}  // namespace distro::transport
