#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/exchange/group.h"
#include "backend/exchange/module_spec.h"

namespace distro::exchange {

/// A rank that has not seen its optimizer yet (it skipped the step) leaves the gain to the others.
inline constexpr float kGainUnknown = 0.0F;

/// What this rank said of itself in an exchange; the others must say the same of themselves.
struct Statement {
  std::uint64_t exchange = 0;  ///< Its number.
  float gain = 1.0F;  ///< What the mean of this exchange is multiplied by, or kGainUnknown.
  std::uint64_t checksum = 0;  ///< Of W before this exchange.
};

/// The messages of one module between this rank and all others, and the checks that the ranks
/// agree.
///
/// Whatever it throws (ExchangeError, transport::PeerError) is the same trouble on every rank:
/// either all ranks see it in the messages, or this one tells the others (Group::abort). Not
/// thread-safe: its owner has the lock.
class Correspondence {
 public:
  /// Takes the group's next module ordinal.
  Correspondence(std::shared_ptr<Group> group, std::vector<TensorSpec> tensors);

  [[nodiscard]] std::uint32_t module() const noexcept { return module_; }
  [[nodiscard]] std::span<const TensorSpec> tensors() const noexcept { return tensors_; }

  /// Send to every other rank; a step: to those of which this rank's participant is another, or
  /// whom it leads.
  void send(MessageKind kind, std::uint16_t flags, const Statement& statement,
            std::span<const std::byte> body);

  /// Exchange begin messages: same module, same number of exchanges, finite weights. Letters by
  /// rank, the own one empty.
  std::vector<Letter> introduce(const Statement& own, std::optional<std::size_t> non_finite);

  /// The same from a rank that does not exchange the module, because of `reason`: no other may.
  void introduce_exact(const std::string& reason);

  /// Whether this rank sends the steps of its participant.
  [[nodiscard]] bool leads() const;

  /// Whether this rank has others that act as one with it.
  [[nodiscard]] bool has_site() const;

  /// Before a step, on a rank of a site that does not lead it: tell the leader what it must hear
  /// from all. `fingerprint`: of this rank's weights.
  void report(const Statement& own, std::uint16_t flags, std::uint64_t fingerprint);

  /// What the leader of a site has heard.
  struct Reports {
    bool ask_resync = false;
    float gain = kGainUnknown;  ///< Of the ranks that know theirs, the own one included.
  };

  /// The reports of the own site, on its leader; checks geometry, gain and checksum, and that all
  /// have the leader's weights (but where the script has edited some: `edited`, or their flag).
  Reports take_reports(const Statement& own, std::uint64_t fingerprint, bool edited);

  /// Every other participant's step message under the own statement's number, where this rank does
  /// not lead the own one's as well; checks finite weights, geometry, gain and checksum. By the
  /// rank that wrote it; empty for the others.
  std::vector<Letter> take_step(const Statement& own);

  /// Instead of a step: this rank stops exchanging the module, because of `reason`; so must all.
  void stop(const Statement& own, const std::string& reason);

  /// The gain of an exchange: that of the ranks that know theirs; nothing if none does.
  [[nodiscard]] std::optional<float> gain_of(const std::vector<Letter>& letters,
                                             const Statement& own) const;

  /// Every rank's average message; exchanges that they sent before are dropped, for the mean holds
  /// what they tell. Checks finite weights. Ranks may be one exchange apart: returns the number of
  /// the furthest.
  [[nodiscard]] std::uint64_t take_average(const Statement& own,
                                           std::optional<std::size_t> non_finite);

  /// This rank has a non-finite weight, and has said so in the message that the others await:
  /// throw.
  [[noreturn]] void fail_non_finite(std::size_t tensor, std::uint64_t exchange) const;

  /// Tell all ranks that `peer` is to blame, and throw.
  [[noreturn]] void blame(int peer, const std::string& message);

  /// "exchange 7 of module 0".
  [[nodiscard]] std::string where(std::uint64_t exchange) const;

 private:
  std::vector<Letter> take_all(MessageKind kind, std::uint64_t exchange);
  std::vector<Letter> take_from(const std::vector<int>& peers, MessageKind kind,
                                std::uint64_t exchange);
  void tell_leader(std::uint16_t flags, const Statement& own, std::span<const std::byte> body);
  [[nodiscard]] Envelope envelope(MessageKind kind, std::uint16_t flags,
                                  const Statement& statement) const;
  void check_finite(const Letter& letter, int peer) const;
  void check_finite(const std::vector<Letter>& letters) const;
  void check_same_door(const std::vector<Letter>& letters, const std::string* reason) const;
  void check_agreement(const std::vector<Letter>& letters, const Statement& own) const;
  [[noreturn]] void explain_geometry(const std::vector<Letter>& letters);

  const std::shared_ptr<Group> group_;
  const std::vector<TensorSpec> tensors_;
  const std::uint32_t module_;
  const std::uint64_t geometry_;
};

/// Body of a message of a rank whose weights are not finite: the tensor's index, u32.
std::vector<std::byte> non_finite_body(std::size_t tensor);

}  // namespace distro::exchange
