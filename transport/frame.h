#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace distro::transport {

// Every byte of a frame is described in docs/protocol.md; change both together.

inline constexpr std::uint8_t kMagic = 0xD7;
inline constexpr std::uint8_t kProtocolVersion = 2;
inline constexpr std::size_t kHeaderBytes = 40;
inline constexpr std::size_t kGreetingBytes = 32;
inline constexpr std::size_t kSkipBytes = 4;

// The most numbers that one SKIP leaves out. Fewer: a sender that is far ahead for one peer needs
// several; more: a number's arithmetic comes nearer to an overflow.
inline constexpr std::uint32_t kMaxSkip = std::uint32_t{1} << 20;

// Longest reason in an ABORT. Shorter: the text of a Python exception is cut; longer: it no longer
// fits beside the smallest chunk below MAXMSGSIZE (chunk + 1 KiB).
inline constexpr std::size_t kMaxReasonBytes = 512;

// The largest frame is a chunk and this much. Less: an honest chunk or abort kills the connection;
// much more: an announced length of a stranger takes that much memory.
inline constexpr std::size_t kFrameAllowance = 1024;
static_assert(kFrameAllowance >= kHeaderBytes + kMaxReasonBytes + 4);

enum class FrameKind : std::uint8_t {
  hello = 1,    ///< From the rank that dialled: who I am, and what I expect next.
  welcome = 2,  ///< The answer to a valid HELLO, of the same form.
  data = 3,     ///< One chunk of a message; numbered.
  ack = 4,      ///< Only what the header says: all before `ack` has arrived.
  goodbye = 5,  ///< The last numbered frame of a rank: nothing more is sent or read.
  abort = 6,    ///< The group cannot go on.
  skip = 7,     ///< Numbers that are left out; numbered.
};

inline constexpr std::uint8_t kFlagFirst = 1;  ///< DATA: first chunk of its message.
inline constexpr std::uint8_t kFlagLast = 2;   ///< DATA: last chunk of its message.
inline constexpr std::uint8_t kFlagHold =
    4;                                       ///< Any: the sender's inbox is full, send no new data.
inline constexpr std::uint8_t kFlagAsk = 8;  ///< ACK: answer with an ACK at once.

struct FrameHeader {
  FrameKind kind = FrameKind::ack;
  std::uint8_t flags = 0;
  std::uint64_t session = 0;   ///< Of the rank that sends the frame.
  std::uint64_t sequence = 0;  ///< DATA, GOODBYE, SKIP: number from 0; otherwise 0.
  std::uint64_t ack = 0;       ///< The number that the sender expects next.
};

/// A frame whose payload somebody else owns.
struct Frame {
  FrameHeader header;
  std::span<const std::byte> payload;
};

/// The frame, or why the bytes are none.
struct ParsedFrame {
  std::optional<Frame> frame;
  std::string_view error;
};

/// Whether frames of this kind share the session's numbering.
[[nodiscard]] bool is_numbered(FrameKind kind) noexcept;

/// The header of a frame that was encoded or checked before.
[[nodiscard]] FrameHeader parse_header(std::span<const std::byte> bytes) noexcept;

/// Write header and payload to `out`, which has exactly kHeaderBytes + payload.size() bytes.
void encode_frame(const Frame& frame, std::span<std::byte> out) noexcept;

/// Check untrusted bytes; the payload of the result points into `bytes`. Allocates nothing.
ParsedFrame parse_frame(std::span<const std::byte> bytes, std::size_t max_payload) noexcept;

/// Payload of HELLO and WELCOME.
struct Greeting {
  std::uint16_t min_version = kProtocolVersion;
  std::uint16_t max_version = kProtocolVersion;
  std::uint32_t rank = 0;
  std::uint32_t world_size = 0;
  std::uint32_t chunk_bytes = 0;
  std::uint64_t group = 0;
  std::uint64_t addressee = 0;  ///< Session of the rank that the greeting is meant for.
};

void encode_greeting(const Greeting& greeting, std::span<std::byte, kGreetingBytes> out) noexcept;

/// `payload` is that of a parsed HELLO or WELCOME, so its size is right already.
Greeting parse_greeting(std::span<const std::byte> payload) noexcept;

/// Payload of SKIP: how many numbers, that of the frame first, are left out.
void encode_skip(std::uint32_t numbers, std::span<std::byte, kSkipBytes> out) noexcept;

/// `payload` is that of a parsed SKIP, so it is from 1 to kMaxSkip.
std::uint32_t parse_skip(std::span<const std::byte> payload) noexcept;

/// Payload of ABORT.
struct AbortNote {
  std::uint32_t culprit = 0;
  std::string reason;
};

std::string encode_abort(std::uint32_t culprit, std::string_view reason);

/// `payload` is that of a parsed ABORT. Bytes of the reason that could forge log lines become '?'.
AbortNote parse_abort(std::span<const std::byte> payload);

}  // namespace distro::transport
