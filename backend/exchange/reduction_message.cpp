#include "backend/exchange/reduction_message.h"

#include <fmt/format.h>

#include <cstring>

namespace distro::exchange {
namespace {

template <typename Value>
void put(std::vector<std::byte>& out, Value value) {
  const auto bytes = std::as_bytes(std::span(&value, 1));
  out.insert(out.end(), bytes.begin(), bytes.end());
}

template <typename Value>
Value get(std::span<const std::byte>& in) {
  Value value;
  if (in.size() < sizeof value) {
    throw EnvelopeError("a reduction that ends inside a field");
  }
  std::memcpy(&value, in.data(), sizeof value);
  in = in.subspan(sizeof value);
  return value;
}

std::vector<std::uint32_t> get_list(std::span<const std::byte>& in, std::size_t tensors) {
  const auto count = get<std::uint32_t>(in);
  if (count == 0 || count > tensors) {
    throw EnvelopeError(
        fmt::format("a list of {} non-finite tensors in a reduction of {}", count, tensors));
  }
  std::vector<std::uint32_t> list;
  for (std::uint32_t i = 0; i < count; ++i) {
    const auto tensor = get<std::uint32_t>(in);
    if (tensor >= tensors || (!list.empty() && tensor <= list.back())) {
      throw EnvelopeError("a list of non-finite tensors that is not ascending");
    }
    list.push_back(tensor);
  }
  return list;
}

}  // namespace

std::vector<std::byte> seal_reduction(const ReductionMessage& message, int writer,
                                      std::uint32_t stream, std::uint64_t number,
                                      std::uint64_t geometry) {
  std::vector<std::byte> body;
  body.reserve(kReductionHeaderBytes + sizeof(std::uint32_t) * (1 + message.non_finite.size()) +
               message.record.size());
  put(body, message.decoded);
  put(body, message.slot);
  std::uint16_t flags = message.exact ? kExact : std::uint16_t{0};
  if (!message.non_finite.empty()) {
    flags = kNonFinite;
    put(body, static_cast<std::uint32_t>(message.non_finite.size()));
    for (const auto tensor : message.non_finite) {
      put(body, tensor);
    }
  }
  body.insert(body.end(), message.record.begin(), message.record.end());
  return seal({.kind = MessageKind::reduction,
               .flags = flags,
               .module = stream,
               .origin = static_cast<std::uint32_t>(writer),
               .exchange = number,
               .geometry = geometry,
               .checksum = message.checksum},
              body);
}

ReductionMessage read_reduction(const Opened& opened, std::size_t tensors) {
  ReductionMessage message;
  auto in = opened.body;
  message.exact = (opened.envelope.flags & kExact) != 0;
  message.checksum = opened.envelope.checksum;
  message.decoded = get<std::uint64_t>(in);
  message.slot = get<std::uint32_t>(in);
  if ((opened.envelope.flags & kNonFinite) != 0) {
    message.non_finite = get_list(in, tensors);
  }
  message.record = in;
  return message;
}

}  // namespace distro::exchange
