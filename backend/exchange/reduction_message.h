#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/exchange/envelope.h"

namespace distro::exchange {

/// What one rank says in a gradient reduction. The message's envelope carries the number of the
/// reduction, the geometry and `checksum`; the rest is its body (docs/protocol.md).
struct ReductionMessage {
  bool exact = false;         ///< No gradient reduction on the sender; nothing below but `decoded`.
  std::uint64_t decoded = 0;  ///< Number of the last reduction that the sender decoded; 0: none.
  std::uint64_t checksum = 0;  ///< Of its result.
  std::uint32_t slot = 0;  ///< Which of its residuals the sender used, for ranks that have none.
  std::vector<std::uint32_t> non_finite = {};  ///< Tensors with a non-finite gradient, ascending.
  std::span<const std::byte> record = {};      ///< The codec's; borrowed.
};

/// The sealed message of rank `writer` in reduction `number` on `stream` (kReductions or
/// kReductionAnswers).
std::vector<std::byte> seal_reduction(const ReductionMessage& message, int writer,
                                      std::uint32_t stream, std::uint64_t number,
                                      std::uint64_t geometry);

/// The other way; `tensors`: how many `non_finite` may name. Borrows from the opened message.
/// Throws EnvelopeError on what seal_reduction() does not write.
ReductionMessage read_reduction(const Opened& opened, std::size_t tensors);

}  // namespace distro::exchange
