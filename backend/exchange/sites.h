#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/exchange/placement.h"

namespace distro::exchange {

/// The participants of a group: sites of ranks with one label (DISTRO_SITE) that hold the same
/// weights and exchange as one, and ranks without a label, each on its own. Participants are in the
/// order of their lowest ranks. A participant's lowest rank, its leader, sends for it. Immutable.
class Sites {
 public:
  /// Labels by rank; empty: the rank is its own participant.
  explicit Sites(const std::vector<std::string>& labels);

  /// `ranks` ranks of which each is its own participant.
  static Sites none(int ranks);

  [[nodiscard]] int ranks() const noexcept { return static_cast<int>(participant_of_.size()); }
  [[nodiscard]] int participants() const noexcept { return static_cast<int>(members_.size()); }

  [[nodiscard]] int participant_of(int rank) const { return participant_of_.at(index(rank)); }
  [[nodiscard]] std::span<const int> members(int participant) const {
    return members_.at(index(participant));
  }
  [[nodiscard]] int leader(int participant) const { return members(participant).front(); }
  [[nodiscard]] int leader_of(int rank) const { return leader(participant_of(rank)); }
  [[nodiscard]] bool leads(int rank) const { return leader_of(rank) == rank; }
  /// The ranks that act as one with `rank`, itself included.
  [[nodiscard]] std::span<const int> site_of(int rank) const {
    return members(participant_of(rank));
  }

  /// The ranks that act as one with `rank`, without it.
  [[nodiscard]] std::vector<int> others_of_site(int rank) const;

  /// The leaders of the participants, but `rank`.
  [[nodiscard]] std::vector<int> other_leaders(int rank) const;

  /// The ranks that `rank` has to do with itself: the leader of its site; for a leader the others
  /// of its site, and the other leaders.
  [[nodiscard]] std::vector<int> neighbours(int rank) const;

  /// Part of a participant in the mean: its ranks of all ranks.
  [[nodiscard]] float weight(int participant) const;

  /// What restores the length of the mean of moves that are nearly orthogonal:
  /// 1 / sqrt(sum of weight^2), the square root of the participants where all have one weight.
  [[nodiscard]] float gain() const;

  /// What a participant's moves count in W when they have been sent: gain * weight.
  [[nodiscard]] float share(int participant, float gain) const;

  /// All participants have as many ranks.
  [[nodiscard]] bool even() const;

  /// "site 'berlin' (ranks 0, 1)", or "rank 2".
  [[nodiscard]] std::string name(int participant) const;

  /// The names of all.
  [[nodiscard]] std::string text() const;

 private:
  static std::size_t index(int number) { return static_cast<std::size_t>(number); }
  struct Fraction {
    int numerator;
    int denominator;
  };
  [[nodiscard]] Fraction part(int participant) const;

  std::vector<std::string> labels_;  // by participant
  std::vector<std::vector<int>> members_;
  std::vector<int> participant_of_;
};

/// The site that a rank has: `site` (DISTRO_SITE) is a label, "host", or empty.
[[nodiscard]] std::string site_label(std::string_view site, std::string_view host);

/// Whether `site` may be given: "host", or a label of letters, digits, '.', '_' and '-', at most
/// kMaxSiteBytes; or empty.
[[nodiscard]] bool is_site(std::string_view site);
inline constexpr std::size_t kMaxSiteBytes = 64;

/// Ranks of one host of which some have a site and some have none: surely the variable was
/// forgotten. Empty if there are none, else a text that names them.
[[nodiscard]] std::string forgotten_site(const std::vector<std::string>& labels,
                                         std::span<const Placement> placements);

}  // namespace distro::exchange
