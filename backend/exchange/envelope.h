#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace distro::exchange {

/// A message of a peer that is not what the engine writes. The caller adds whose it is.
class EnvelopeError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class MessageKind : std::uint8_t {
  begin = 1,  ///< A module's first training forward: geometry and checksum of the initial weights.
  step = 2,   ///< One exchange; the body is the codec's record.
  average = 3,    ///< The rank has called average(); no body.
  describe = 4,   ///< Names and shapes of the module's tensors, sent when geometries differ; the
                  ///< body is text.
  reduction = 5,  ///< One gradient reduction; the body is reduction_message.h's.
  check = 6,      ///< What a rank of a site tells its leader at an exchange: the body is a
                  ///< fingerprint of its weights (u64), or a reason.
};

/// Flags of a message.
/// kAsksResync: the script has overwritten the weights of this rank.
/// kNonFinite: this rank's weights are not finite; the body ends in the tensor's index (u32). In a
/// reduction: gradients of this rank are not finite; the body lists them.
/// kExact: this rank does not exchange the module (any more); the body ends in the reason, text. A
/// reduction that is no gradient's on this rank; no record follows unless a peer's is one.
inline constexpr std::uint16_t kAsksResync = 1;
inline constexpr std::uint16_t kNonFinite = 2;
inline constexpr std::uint16_t kExact = 4;

/// Largest text of a message, in bytes: a reason, a description.
inline constexpr std::size_t kMaxReasonBytes = 512;
inline constexpr std::size_t kMaxDescriptionBytes = std::size_t{1} << 20;
/// Module ordinals that no module gets: gradient reductions of the group, in order; and what
/// follows on them (records of ranks that had announced an exact one, descriptions).
inline constexpr std::uint32_t kReductions = 0xffffffff;
inline constexpr std::uint32_t kReductionAnswers = 0xfffffffe;

/// Size of the least body of a reduction (all that comes before lists and records), in bytes.
inline constexpr std::size_t kReductionHeaderBytes = 12;

/// What stands before every record (docs/protocol.md gives the bytes).
struct Envelope {
  MessageKind kind = MessageKind::step;
  std::uint16_t flags = 0;
  std::uint32_t module = 0;  ///< Ordinal of the module in its group.
  std::uint32_t origin = 0;  ///< Rank that wrote the message; others may have passed it on.
  float gain = 0.0F;         ///< What the sender will multiply the mean of this exchange by.
  std::uint64_t exchange =
      0;  ///< Number of the exchange or reduction, from 1; 0 in begin and describe.
  std::uint64_t geometry = 0;  ///< Hash of the module's tensors and of the codec's parameters.
  std::uint64_t checksum = 0;  ///< Of the sender's W before this exchange; in a reduction, of the
                               ///< last result that the sender has decoded.
};

/// Size of everything in a message that is not body, in bytes.
inline constexpr std::size_t kEnvelopeBytes = 56;

/// The message: envelope, body, and a 64-bit XXH3 over both.
std::vector<std::byte> seal(const Envelope& envelope, std::span<const std::byte> body);

/// A checked message; `body` borrows from the bytes given to open().
struct Opened {
  Envelope envelope;
  std::span<const std::byte> body;
};

/// Check and take apart what a peer sent. Throws EnvelopeError on any change of any byte.
Opened open(std::span<const std::byte> message);

}  // namespace distro::exchange
