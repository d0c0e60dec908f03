#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "backend/exchange/combine.h"
#include "backend/exchange/envelope.h"
#include "transport/channel.h"

namespace distro::exchange {

/// Bytes of an operation in one message: what is in hand at a time of each rank in a reduction, and
/// by how much a message of another operation may be held up. Smaller costs headers and wake-ups,
/// larger delays what comes behind on a slow line. A multiple of every element's size.
inline constexpr std::size_t kTransferChunk = std::size_t{128} << 10;

/// Streams of collectives of one group, at most (its own, the ordered one, its site's).
inline constexpr std::uint32_t kMaxStreams = 8;

/// Largest text of a fault, in bytes.
inline constexpr std::size_t kMaxFaultBytes = 1024;

enum class TransferKind : std::uint8_t {
  collective = 1,      ///< A part of what a rank sends in a collective; numbered by stream.
  message = 2,         ///< A part of a message from rank to rank; numbered by receiver.
  stream_credit = 3,   ///< The offset is how many bytes of a stream may be sent in all.
  message_credit = 4,  ///< The offset is how far a message may be sent.
  pool_credit = 5,     ///< The offset is how many bytes of messages may be sent in all before they
                       ///< are asked for.
  fault = 6,           ///< The group cannot go on; the payload says why, as text.
};

enum class TransferOperation : std::uint8_t {
  barrier = 1,
  broadcast,
  all_reduce,
  reduce,
  all_gather,
  gather,
  scatter,
  reduce_scatter,
  all_to_all,
  sparse_all_reduce,
  send,
};

/// What an operation is; all but `total` must be the same on all its ranks.
struct TransferDescription {
  std::uint64_t total = 0;  ///< Bytes that the sender sends to this receiver in this operation.
  TransferOperation operation = TransferOperation::barrier;
  ElementType type = ElementType::opaque;
  Combiner combiner = Combiner::none;
  std::uint32_t root = 0;      ///< Rank of the group; of a message: its tag. 0 where there is none.
  std::uint64_t elements = 0;  ///< Of each rank; 0 where ranks may have different numbers.
};

/// "all_reduce of 10 float32 (SUM)".
[[nodiscard]] std::string text_of(const TransferDescription& description);
[[nodiscard]] std::string_view name_of(TransferOperation operation) noexcept;
/// The same operation, whatever is sent to whom in it.
[[nodiscard]] bool same(const TransferDescription& a, const TransferDescription& b) noexcept;

struct TransferHeader {
  TransferKind kind = TransferKind::collective;
  bool pooled = false;  ///< Of a message: its receiver had not asked for these bytes.
  std::uint32_t stream = 0;
  std::uint64_t number = 0;
  std::uint64_t offset = 0;
};

inline constexpr std::size_t kTransferHeaderBytes = 32;
inline constexpr std::size_t kTransferDescriptionBytes = 24;

/// The bytes of a message. Its first part (offset 0 of a collective or message) has a description.
[[nodiscard]] transport::Bytes write_transfer(const TransferHeader& header,
                                              const TransferDescription* description,
                                              std::span<const std::byte> payload);

struct OpenedTransfer {
  TransferHeader header;
  std::optional<TransferDescription> description;
  std::span<const std::byte> payload;  ///< Borrows.
};

/// Check and take apart what a peer sent: what is returned follows the grammar, and allocates
/// nothing. Throws EnvelopeError.
[[nodiscard]] OpenedTransfer open_transfer(std::span<const std::byte> message);

}  // namespace distro::exchange
