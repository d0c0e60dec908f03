#include "backend/exchange/transfer_message.h"

#include <fmt/format.h>

#include <array>
#include <cstring>

#include "backend/exchange/wire.h"

namespace distro::exchange {
namespace {

constexpr std::uint32_t kMagic = 0x58585844;  // "DXXX"
constexpr std::uint8_t kVersion = 1;
constexpr std::uint8_t kFirst = 1;
constexpr std::uint8_t kPooled = 2;

constexpr std::array<std::string_view, 12> kNames = {"",
                                                     "barrier",
                                                     "broadcast",
                                                     "all_reduce",
                                                     "reduce",
                                                     "all_gather",
                                                     "gather",
                                                     "scatter",
                                                     "reduce_scatter",
                                                     "all_to_all",
                                                     "sparse_all_reduce",
                                                     "send"};

bool is_part(TransferKind kind) {
  return kind == TransferKind::collective || kind == TransferKind::message;
}

TransferDescription read_description(const std::byte* in) {
  TransferDescription description;
  description.total = get<std::uint64_t>(in);
  const auto operation = get<std::uint8_t>(in);
  const auto type = get<std::uint8_t>(in);
  const auto combiner = get<std::uint8_t>(in);
  const auto reserved = get<std::uint8_t>(in);
  description.root = get<std::uint32_t>(in);
  description.elements = get<std::uint64_t>(in);
  if (operation == 0 || operation >= kNames.size() || type >= kElementTypes ||
      combiner >= kCombiners || reserved != 0) {
    throw EnvelopeError(fmt::format(
        "its description is of an unknown operation ({}), element type ({}) or operator ({})",
        operation, type, combiner));
  }
  description.operation = static_cast<TransferOperation>(operation);
  description.type = static_cast<ElementType>(type);
  description.combiner = static_cast<Combiner>(combiner);
  return description;
}

void check_part(const OpenedTransfer& opened) {
  const TransferHeader& header = opened.header;
  const std::size_t size = opened.payload.size();
  if (size > kTransferChunk || (!opened.description && size == 0)) {
    throw EnvelopeError(fmt::format("a part of {} bytes", size));
  }
  // What is not first may still begin at 0: of a message whose first part was empty.
  if (opened.description && header.offset != 0) {
    throw EnvelopeError("its first part does not begin at 0");
  }
  if (opened.description && size > opened.description->total) {
    throw EnvelopeError(fmt::format("a part of {} bytes of {}", size, opened.description->total));
  }
  const bool message = header.kind == TransferKind::message;
  if (opened.description && message != (opened.description->operation == TransferOperation::send)) {
    throw EnvelopeError("its operation does not belong to its kind");
  }
  if (header.pooled && !message) {
    throw EnvelopeError("its flags do not belong to its kind");
  }
}

}  // namespace

std::string_view name_of(TransferOperation operation) noexcept {
  return kNames[static_cast<std::size_t>(operation)];
}

bool same(const TransferDescription& a, const TransferDescription& b) noexcept {
  return a.operation == b.operation && a.type == b.type && a.combiner == b.combiner &&
         a.root == b.root && a.elements == b.elements;
}

std::string text_of(const TransferDescription& description) {
  std::string text(name_of(description.operation));
  const bool rooted = description.operation == TransferOperation::broadcast ||
                      description.operation == TransferOperation::reduce ||
                      description.operation == TransferOperation::gather ||
                      description.operation == TransferOperation::scatter;
  if (rooted) {
    text += fmt::format(" {} rank {}",
                        description.operation == TransferOperation::broadcast ||
                                description.operation == TransferOperation::scatter
                            ? "from"
                            : "to",
                        description.root);
  }
  if (description.operation == TransferOperation::barrier) {
    return text;
  }
  text += " of ";
  if (description.elements > 0) {
    text += fmt::format("{} ", description.elements);
  }
  text += name_of(description.type);
  if (description.combiner != Combiner::none) {
    text += fmt::format(" ({})", name_of(description.combiner));
  }
  return text;
}

transport::Bytes write_transfer(const TransferHeader& header,
                                const TransferDescription* description,
                                std::span<const std::byte> payload) {
  transport::Bytes message(kTransferHeaderBytes +
                           (description != nullptr ? kTransferDescriptionBytes : 0) +
                           payload.size());
  std::byte* out = message.data();
  put(out, kMagic);
  put(out, kVersion);
  put(out, static_cast<std::uint8_t>(header.kind));
  put(out, static_cast<std::uint8_t>((description != nullptr ? kFirst : 0) |
                                     (header.pooled ? kPooled : 0)));
  put(out, std::uint8_t{0});
  put(out, header.stream);
  put(out, static_cast<std::uint32_t>(payload.size()));
  put(out, header.number);
  put(out, header.offset);
  if (description != nullptr) {
    put(out, description->total);
    put(out, static_cast<std::uint8_t>(description->operation));
    put(out, static_cast<std::uint8_t>(description->type));
    put(out, static_cast<std::uint8_t>(description->combiner));
    put(out, std::uint8_t{0});
    put(out, description->root);
    put(out, description->elements);
  }
  if (!payload.empty()) {
    std::memcpy(out, payload.data(), payload.size());
  }
  return message;
}

OpenedTransfer open_transfer(std::span<const std::byte> message) {
  if (message.size() < kTransferHeaderBytes) {
    throw EnvelopeError(fmt::format("{} bytes, but the shortest message has {}", message.size(),
                                    kTransferHeaderBytes));
  }
  const std::byte* in = message.data();
  if (const auto magic = get<std::uint32_t>(in); magic != kMagic) {
    throw EnvelopeError(fmt::format("magic number {:#x}, expected {:#x}", magic, kMagic));
  }
  if (const auto version = get<std::uint8_t>(in); version != kVersion) {
    throw EnvelopeError(
        fmt::format("version {} of exact collectives, this rank speaks {}", version, kVersion));
  }
  const auto kind = get<std::uint8_t>(in);
  const auto flags = get<std::uint8_t>(in);
  const auto reserved = get<std::uint8_t>(in);
  OpenedTransfer opened;
  opened.header.stream = get<std::uint32_t>(in);
  const std::size_t payload_bytes = get<std::uint32_t>(in);
  opened.header.number = get<std::uint64_t>(in);
  opened.header.offset = get<std::uint64_t>(in);
  if (kind < static_cast<std::uint8_t>(TransferKind::collective) ||
      kind > static_cast<std::uint8_t>(TransferKind::fault)) {
    throw EnvelopeError(fmt::format("unknown kind {}", kind));
  }
  opened.header.kind = static_cast<TransferKind>(kind);
  const bool first = (flags & kFirst) != 0;
  opened.header.pooled = (flags & kPooled) != 0;
  if ((flags & ~(kFirst | kPooled)) != 0 || reserved != 0 ||
      (!is_part(opened.header.kind) && flags != 0)) {
    throw EnvelopeError(fmt::format("flags {:#x}, which do not belong to its kind", flags));
  }
  if (opened.header.stream >= kMaxStreams) {
    throw EnvelopeError(fmt::format("stream {}, there are {}", opened.header.stream, kMaxStreams));
  }
  const std::size_t before = kTransferHeaderBytes + (first ? kTransferDescriptionBytes : 0);
  if (message.size() < before || message.size() - before != payload_bytes) {
    throw EnvelopeError(fmt::format("announces {} bytes after its header, and has {} in all",
                                    payload_bytes, message.size()));
  }
  opened.payload = message.subspan(before);
  if (is_part(opened.header.kind)) {
    if (first) {
      opened.description = read_description(in);
    }
    check_part(opened);
  } else if (payload_bytes > (opened.header.kind == TransferKind::fault ? kMaxFaultBytes : 0)) {
    throw EnvelopeError(fmt::format("{} bytes do not belong to its kind", payload_bytes));
  }
  return opened;
}

}  // namespace distro::exchange
