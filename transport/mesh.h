#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>
#include <zmq.hpp>

#include "transport/channel.h"
#include "transport/frame.h"
#include "transport/inbox.h"
#include "transport/io_service.h"
#include "transport/link.h"
#include "transport/peer.h"
#include "transport/probes.h"

namespace distro::transport {

/// The I/O thread's half of a channel: the sockets and sessions to all peers of a rank. One duplex
/// connection a pair: the higher rank dials the lower one, or both reach each other by a relay. All
/// members are for the I/O thread; callers meet it in the Inbox.
class Mesh final : public IoHandler {
 public:
  /// Binds. Throws ConfigError.
  Mesh(IoService& service, const ChannelConfig& config, const PeerAddress& own, Inbox& inbox);

  [[nodiscard]] const std::string& endpoint() const noexcept { return acceptor_->endpoint(); }

  void connect(std::vector<PeerAddress> addresses);
  void send(int peer, const SharedBytes& message);
  struct Letter {
    int peer;
    SharedBytes message;
  };
  /// Send one message to several peers: the letters hold the same bytes.
  void multicast(std::span<const Letter> letters);
  /// The inbox has room again for the peer's messages.
  void resume(int peer);
  /// Have all peers acknowledge at once: those that live answer.
  void ask();
  /// How long a peer may stay disconnected.
  void set_timeout(std::chrono::milliseconds timeout) noexcept { timeout_ = timeout; }
  /// Tell all peers that `culprit` is lost.
  void tell_lost(int culprit, std::string_view reason);
  /// Work on until everything is delivered or the deadline has passed, then close the sockets and
  /// the inbox. Without a goodbye nothing is delivered but aborts.
  void start_closing(Deadline deadline, bool goodbye);

  void append_poll_items(std::vector<zmq::pollitem_t>& items) override;
  Deadline work(Deadline now, std::span<const zmq::pollitem_t> items) override;
  void fail(const std::string& reason) noexcept override;

 private:
  struct Closing {
    Deadline began;
    Deadline deadline;
    bool goodbye;
  };

  // Frames.
  bool receive_from_acceptor(Deadline now);  // true: there may be more
  bool receive_from_dialer(Peer& peer, Deadline now);
  std::optional<Frame> parse(const zmq::message_t& body);
  void on_hello(const std::string& route, const Frame& frame, std::optional<int> authenticated,
                Deadline now);
  void on_welcome(Peer& peer, const Frame& frame, Deadline now);
  void on_frame(Peer& peer, const Frame& frame, Deadline now);
  void on_abort(Peer& peer, const Frame& frame);
  [[nodiscard]] std::string greeting_error(const Frame& frame, const Peer* peer) const;
  /// `kind`: what is logged once.
  void reject(std::string_view kind, std::string_view why);
  void reject(std::string_view why) { reject(why, why); }

  // Connections.
  void on_dialer_changes(Peer& peer, Deadline now);
  void up(Peer& peer, Deadline now);
  void down(Peer& peer, Deadline now);
  void set_state(Peer& peer, PeerState state, Deadline now);
  void probe(Deadline now);
  static void owe_abort(Peer& peer, int culprit, std::string_view reason);

  // Losses.
  void watch(Deadline now);
  [[nodiscard]] std::string death_of(const Peer& peer, Deadline now) const;
  void lose(Peer& peer, const std::string& reason, bool tell_others);

  // End.
  [[nodiscard]] bool settled(const Peer& peer, Deadline now) const;
  bool close_if_done(Deadline now);
  void count_carried();
  void count_rejected(std::uint64_t connections) noexcept;
  void finish();

  [[nodiscard]] Peer* find(std::uint32_t rank) noexcept;

  const ChannelConfig& config_;
  std::chrono::milliseconds timeout_;
  const PeerAddress& own_;
  Inbox& inbox_;
  Pacer& pacer_;
  std::unique_ptr<Listener> acceptor_;
  std::vector<std::unique_ptr<Peer>> peers_;     // by rank, null but for neighbours; empty before
                                                 // connect
  std::unordered_map<std::string, int> routes_;  // routing id to rank, after a valid HELLO
  std::size_t first_to_send_ = 0;                // in turns, where peers share what there is
  Probes probes_;
  Deadline watch_at_ = Deadline::max();
  std::optional<Closing> closing_;
  bool done_ = false;
};

}  // namespace distro::transport
