#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>
#include <zmq.hpp>

#include "transport/channel.h"
#include "transport/frame.h"
#include "transport/inbox.h"
#include "transport/link.h"
#include "transport/pacer.h"
#include "transport/session.h"

namespace distro::transport {

/// One peer as the I/O thread sees it: its session, its connection (we dial lower ranks, higher
/// ranks dial us), and what is owed to it outside the session's numbering. I/O thread.
class Peer {
 public:
  Peer(int rank, PeerAddress address, const ChannelConfig& config, std::uint64_t own_session,
       Deadline now);

  /// Hand over to the carrier what may go now: greeting, abort, then the session's frames. False if
  /// the connection turned out to be gone. Sets more_to_send if it stopped only for fairness.
  bool pump(Listener& acceptor, Pacer& pacer, const ChannelConfig& config, LiveCounters& counters,
            Deadline now);

  /// The connection can carry frames, and the greetings were exchanged.
  void went_up(Deadline now) noexcept;
  void went_down(Deadline now) noexcept;

  [[nodiscard]] bool finished() const noexcept {
    return state == PeerState::left || state == PeerState::lost;
  }
  /// Something waits to be handed to the carrier.
  [[nodiscard]] bool must_flush() const noexcept {
    return up && (staged_.has_value() || owed_abort.has_value() || session.owes_ack());
  }
  [[nodiscard]] bool blocked() const noexcept {
    return staged_.has_value() && paced_until_ == Deadline::min();
  }
  [[nodiscard]] Deadline next_timer(Deadline now) const noexcept;

  const int rank;
  const PeerAddress address;
  Session session;
  PeerState state = PeerState::connecting;
  bool up = false;
  bool ever_up = false;
  Deadline quiet_since;  ///< up: when the last frame came; otherwise since when it is not up.

  std::unique_ptr<Link> dialer;  ///< Lower ranks only; null after a finished peer has gone.
  std::size_t poll_index = 0;    ///< Of the dialer's items.
  std::string route;             ///< Higher ranks: routing id of the connection with a valid HELLO.

  bool owes_greeting = false;
  Deadline greet_at = Deadline::max();  ///< dialer: when to repeat the HELLO.
  Clock::duration greet_wait{};
  std::optional<std::string> owed_abort;  ///< Payload.

 private:
  // What one pump works with.
  struct Round {
    Listener& acceptor;
    Pacer* pacer;  // null: this peer is not paced here
    const ChannelConfig& config;
    LiveCounters& counters;
    Deadline now;
  };
  // Not one of the own site, and not where the hub does it for all.
  [[nodiscard]] bool paced_here(const ChannelConfig& config) const noexcept;
  bool transmit(const Frame& frame, const Round& round);
  bool flush(const Round& round);
  [[nodiscard]] Frame greeting_frame(const ChannelConfig& config);

  std::optional<zmq::message_t> staged_;  // refused by the carrier for want of space; goes first
  std::vector<std::byte> greeting_;
  bool more_to_send_ = false;
  Deadline paced_until_ = Deadline::min();  // staged_ waits for its turn at the rate limit
};

}  // namespace distro::transport
