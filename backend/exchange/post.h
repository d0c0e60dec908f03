#pragma once

#include <span>
#include <vector>

#include "backend/exchange/envelope.h"
#include "backend/exchange/sites.h"
#include "transport/channel.h"

namespace distro::exchange {

struct Counters;

/// The ways of messages in a group: a rank of a site knows its own leader only, leaders know each
/// other and their ranks, and a leader passes on what concerns the others of its site, or the other
/// sites. Where each rank is its own participant all are leaders, and everything goes straight.
class Post {
 public:
  /// `uploads_once`: what goes to several neighbours leaves this host once (a hub).
  Post(transport::Channel& channel, Counters& counters, const Sites& sites, int rank,
       bool uploads_once);

  /// Send what `writer` wrote, perhaps this rank itself, to the neighbours that get it from here. A
  /// neighbour that has ended normally needs it no more.
  void spread(int writer, const transport::SharedBytes& message) const;

  /// Send to one neighbour.
  void send(int neighbour, const transport::SharedBytes& message) const;

  /// From whom what `writer` wrote comes to this rank.
  [[nodiscard]] int way_to(int writer) const;

  /// Whether `neighbour` may give this rank this message: by who wrote it, and what it may write.
  [[nodiscard]] bool may_bring(int neighbour, const Envelope& envelope) const;

  /// Neighbours whose messages other ranks get from here.
  [[nodiscard]] const std::vector<int>& brings_for_others() const noexcept { return bringing_; }

  /// Whether messages of `writer` go on to others from here.
  [[nodiscard]] bool passes_on(int writer) const;

  /// Whether the neighbour is of this rank's own site.
  [[nodiscard]] bool is_near(int neighbour) const;

 private:
  void count(std::size_t recipients, bool near, const transport::Bytes& message) const;
  void multicast(const std::vector<int>& neighbours, const transport::SharedBytes& message) const;

  transport::Channel& channel_;
  Counters& counters_;
  const Sites& sites_;
  const int rank_;
  const int leader_;  // this rank's own
  const bool uploads_once_;
  std::vector<int> site_;         // neighbours of the own site
  std::vector<int> other_sites_;  // neighbours elsewhere: leaders
  std::vector<int> bringing_;
};

}  // namespace distro::exchange
