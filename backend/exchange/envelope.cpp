#include "backend/exchange/envelope.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <cmath>
#include <cstring>

#include "backend/exchange/wire.h"

namespace distro::exchange {
namespace {

constexpr std::uint32_t kMagic = 0x52545844;  // "DXTR"
constexpr std::uint8_t kVersion = 2;
constexpr std::size_t kHeaderBytes = 48;
constexpr std::size_t kCheckBytes = 8;
static_assert(kHeaderBytes + kCheckBytes == kEnvelopeBytes);

// What the kinds may carry (docs/protocol.md): sizes of bodies in bytes, and fields that must be 0.
void check_reduction(const Envelope& envelope, std::size_t body_bytes) {
  constexpr std::size_t kLeastListBytes = 8;  // a count and one index
  const bool exact = (envelope.flags & kExact) != 0;
  const bool non_finite = (envelope.flags & kNonFinite) != 0;
  if (exact ? body_bytes != kReductionHeaderBytes
            : body_bytes < kReductionHeaderBytes + (non_finite ? kLeastListBytes : 0)) {
    throw EnvelopeError(
        fmt::format("a body of {} bytes does not belong to its kind and flags", body_bytes));
  }
  if ((exact && non_finite) || (envelope.flags & kAsksResync) != 0) {
    throw EnvelopeError("its flags do not belong to its kind");
  }
  if (envelope.exchange == 0 || envelope.gain != 0.0F) {
    throw EnvelopeError("its exchange number or gain does not belong to its kind");
  }
}

void check_kind(const Envelope& envelope, std::size_t body_bytes) {
  if (envelope.kind == MessageKind::reduction) {
    return check_reduction(envelope, body_bytes);
  }
  constexpr std::size_t kIndexBytes = 4;
  constexpr std::size_t kCountBytes = 8;
  const bool non_finite = (envelope.flags & kNonFinite) != 0;
  const bool exact = (envelope.flags & kExact) != 0;
  const bool check = envelope.kind == MessageKind::check;
  const bool step = envelope.kind == MessageKind::step;
  const bool describe = envelope.kind == MessageKind::describe;
  const bool counts = envelope.kind == MessageKind::begin || (check && !exact);
  const std::size_t least = (counts ? kCountBytes : 0) + (non_finite ? kIndexBytes : 0);
  std::size_t most = least;
  if (exact) {
    most += kMaxReasonBytes;
  } else if (describe) {
    most = kMaxDescriptionBytes;
  } else if (step && !non_finite) {
    most = SIZE_MAX;  // a record, for the codec to check
  }
  if (body_bytes < least || body_bytes > most) {
    throw EnvelopeError(
        fmt::format("a body of {} bytes does not belong to its kind and flags", body_bytes));
  }
  const bool of_exchange = step || check;
  const bool numbered = of_exchange || envelope.kind == MessageKind::average;
  if ((!numbered && envelope.exchange != 0) || (of_exchange && envelope.exchange == 0) ||
      (!of_exchange && envelope.gain != 0.0F) || envelope.gain < 0.0F) {
    throw EnvelopeError("its exchange number or gain does not belong to its kind");
  }
  const bool begin_or_exchange = of_exchange || envelope.kind == MessageKind::begin;
  if ((!of_exchange && (envelope.flags & kAsksResync) != 0) ||
      ((describe || check) && non_finite) ||
      (exact && (!begin_or_exchange || envelope.flags != kExact))) {
    throw EnvelopeError("its flags do not belong to its kind");
  }
}

}  // namespace

std::vector<std::byte> seal(const Envelope& envelope, std::span<const std::byte> body) {
  if (body.size() > UINT32_MAX) {
    throw EnvelopeError(fmt::format(
        "a record of {} bytes is larger than the protocol allows (4 GiB)", body.size()));
  }
  std::vector<std::byte> message(kEnvelopeBytes + body.size());
  std::byte* out = message.data();
  put(out, kMagic);
  put(out, kVersion);
  put(out, static_cast<std::uint8_t>(envelope.kind));
  put(out, envelope.flags);
  put(out, envelope.module);
  put(out, envelope.origin);
  put(out, envelope.gain);
  put(out, envelope.exchange);
  put(out, envelope.geometry);
  put(out, envelope.checksum);
  put(out, static_cast<std::uint32_t>(body.size()));
  if (!body.empty()) {
    std::memcpy(out, body.data(), body.size());
    out += body.size();
  }
  put(out, static_cast<std::uint64_t>(XXH3_64bits(message.data(), kHeaderBytes + body.size())));
  return message;
}

Opened open(std::span<const std::byte> message) {
  if (message.size() < kEnvelopeBytes) {
    throw EnvelopeError(
        fmt::format("{} bytes, but the shortest message has {}", message.size(), kEnvelopeBytes));
  }
  const std::byte* in = message.data();
  Opened opened;
  if (const auto magic = get<std::uint32_t>(in); magic != kMagic) {
    throw EnvelopeError(fmt::format("magic number {:#x}, expected {:#x}", magic, kMagic));
  }
  if (const auto version = get<std::uint8_t>(in); version != kVersion) {
    throw EnvelopeError(fmt::format("record version {}, this rank speaks {}", version, kVersion));
  }
  const auto kind = get<std::uint8_t>(in);
  opened.envelope.flags = get<std::uint16_t>(in);
  opened.envelope.module = get<std::uint32_t>(in);
  opened.envelope.origin = get<std::uint32_t>(in);
  opened.envelope.gain = get<float>(in);
  opened.envelope.exchange = get<std::uint64_t>(in);
  opened.envelope.geometry = get<std::uint64_t>(in);
  opened.envelope.checksum = get<std::uint64_t>(in);
  const std::size_t body_bytes = get<std::uint32_t>(in);
  if (body_bytes != message.size() - kEnvelopeBytes) {
    throw EnvelopeError(fmt::format("announces a body of {} bytes, has {}", body_bytes,
                                    message.size() - kEnvelopeBytes));
  }
  opened.body = message.subspan(kHeaderBytes, body_bytes);
  in += body_bytes;
  if (get<std::uint64_t>(in) != XXH3_64bits(message.data(), kHeaderBytes + body_bytes)) {
    throw EnvelopeError("its checksum does not fit its bytes");
  }
  if (kind < static_cast<std::uint8_t>(MessageKind::begin) ||
      kind > static_cast<std::uint8_t>(MessageKind::check)) {
    throw EnvelopeError(fmt::format("unknown kind {}", kind));
  }
  opened.envelope.kind = static_cast<MessageKind>(kind);
  if ((opened.envelope.flags & ~(kAsksResync | kNonFinite | kExact)) != 0) {
    throw EnvelopeError(fmt::format("unknown flags {:#x}", opened.envelope.flags));
  }
  if (!std::isfinite(opened.envelope.gain)) {
    throw EnvelopeError("its gain is not finite");
  }
  check_kind(opened.envelope, body_bytes);
  return opened;
}

}  // namespace distro::exchange
