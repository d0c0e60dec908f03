#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/exchange/group.h"
#include "backend/exchange/reduction.h"
#include "backend/exchange/reduction_message.h"

namespace distro::exchange {

/// A reduction that this rank has announced to the others.
struct OpenReduction {
  Reduction reduction;
  std::uint64_t number = 0;    ///< From 1, in the order in which all ranks submit.
  std::uint64_t geometry = 0;  ///< Of its description.
  /// What this rank sent: for all ranks alike, or (scatter) for each rank. Empty: announced exact.
  std::vector<plugins::OwnRecord> own;
  std::vector<std::uint32_t> non_finite;  ///< Inputs with a non-finite gradient, ascending.
  std::vector<std::shared_ptr<plugins::Residual>> residuals;
  std::size_t sent_bytes = 0;  ///< Of its records.
};

/// The messages of a group's gradient reductions, the agreement of the ranks about them, and the
/// codec's calls.
///
/// Each rank broadcasts one message a reduction: its record, or that it takes it for an exact one.
/// All exact: all run it exactly. Any record: those that said exact encode what they have and send
/// it as a second message, so that a reduction is compressed on all ranks or on none. What makes it
/// throw (ExchangeError, transport::PeerError) is the same trouble on every rank: either all see it
/// in the messages, or this one tells the others (Group::abort). Not thread-safe.
class ReductionExchange {
 public:
  explicit ReductionExchange(Group& group);

  /// Encode open.reduction, unless it is exact, and send. Several may be open at once, even with
  /// one residual: all that is done to it is addition.
  void open(OpenReduction& open);

  /// Wait for the other ranks' messages, and decode into the output or start the exact reduction.
  /// In the order of open(). True: the output is written; false: the exact reduction runs.
  bool finish(OpenReduction& open);

 private:
  using Messages = std::vector<ReductionMessage>;  // by rank; the own one is empty

  [[nodiscard]] std::string description(const Reduction& reduction) const;
  const plugins::GradientCodec& codec(const OpenReduction& open);
  void encode_and_send(OpenReduction& open, std::uint32_t stream, std::uint32_t slot);
  Letter take(int peer, const Subject& subject, transport::Deadline deadline);
  std::vector<Letter> take_announced(const OpenReduction& open);
  [[noreturn]] void fail_difference(const OpenReduction& open, const std::vector<Letter>& letters);
  Messages read(const OpenReduction& open, const std::vector<Letter>& letters);
  // Replace the letters and messages of ranks that announced an exact reduction by their records.
  void take_answers(const OpenReduction& open, std::vector<Letter>& letters, Messages& messages);
  void decode(OpenReduction& open, const Messages& messages);
  ReductionMessage read_one(const OpenReduction& open, int peer, const Letter& letter);
  void note_result(const OpenReduction& open);
  [[noreturn]] void blame(int peer, const std::string& message);

  Group& group_;
  const plugins::GradientConfig config_;
  std::uint64_t opened_ = 0;
  std::map<std::uint64_t, std::unique_ptr<plugins::GradientCodec>> codecs_;  // by geometry
  std::map<std::uint64_t, std::uint64_t> results_;  // checksums of the last results, by number
};

}  // namespace distro::exchange
