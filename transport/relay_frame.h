#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>
#include <zmq.hpp>

namespace distro::transport {

// What ranks and a relay say to each other, around the frames (frame.h) that the relay passes on
// without looking into them. Every byte is described in docs/protocol.md; change both together.

inline constexpr std::uint8_t kRelayMagic = 0xD8;
inline constexpr std::uint8_t kRelayVersion = 1;
inline constexpr std::size_t kRelayHeaderBytes = 8;

// Ranks of one group. Fewer: large groups are refused; more: a hostile JOIN makes larger tables,
// and a FORWARD names more ranks than fit beside a chunk.
inline constexpr std::size_t kMaxGroup = 4096;

// The largest message is a chunk's frame and this much. Less: a chunk for all does not fit.
inline constexpr std::size_t kRelayAllowance = kRelayHeaderBytes + 2 * kMaxGroup + 1024;

inline constexpr std::size_t kMaxRefusalBytes = 512;

enum class RelayKind : std::uint8_t {
  join = 1,     ///< Rank: I am this member of this group.
  leave = 2,    ///< Rank: I am a member no more.
  forward = 3,  ///< Rank: a frame for these members.
  joined = 4,   ///< Relay: you are; of each other that is here `present` follows.
  present = 5,  ///< Relay: that member is here from now on.
  absent = 6,   ///< Relay: what you sent to that member since it came may be lost.
  deliver = 7,  ///< Relay: a frame of that member.
  refused = 8,  ///< Relay: you are not, because...
  ping = 9,     ///< Relay: nothing; it looks whether the connection still is.
};

/// In place of a FORWARD's count of members: for all others that are here.
inline constexpr std::uint32_t kEveryone = 0xFFFF'FFFF;

/// A checked message; spans point into the bytes that were parsed.
struct RelayMessage {
  RelayKind kind = RelayKind::ping;
  std::uint32_t member = 0;           ///< join, present, absent, deliver.
  std::uint64_t group = 0;            ///< join.
  bool everyone = false;              ///< forward: for all others; `others` is empty.
  std::vector<std::uint16_t> others;  ///< forward: for whom, ascending.
  std::span<const std::byte> rest;    ///< forward, deliver: the frame; refused: text.
};

struct ParsedRelayMessage {
  std::optional<RelayMessage> message;
  std::string_view error;
};

/// Check untrusted bytes. Allocates for the numbers that the bytes really hold only.
ParsedRelayMessage parse_relay_message(std::span<const std::byte> bytes);

/// The protocol version of a JOIN that parse_relay_message refuses because of it, so that it can be
/// answered; empty if the bytes are no JOIN.
[[nodiscard]] std::optional<std::uint8_t> version_of_join(
    std::span<const std::byte> bytes) noexcept;

zmq::message_t make_join(std::uint64_t group, std::uint32_t member);
zmq::message_t make_leave();
/// For these members, in ascending order; none: for everyone.
zmq::message_t make_forward(std::span<const std::uint16_t> members,
                            std::span<const std::byte> frame);
/// joined, present, absent or ping; `member` is 0 where the kind has none.
zmq::message_t make_notice(RelayKind kind, std::uint32_t member = 0);
zmq::message_t make_deliver(std::uint32_t member, std::span<const std::byte> frame);
zmq::message_t make_refused(std::string_view reason);

}  // namespace distro::transport
