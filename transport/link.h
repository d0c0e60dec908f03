#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>
#include <zmq.hpp>

#include "transport/channel.h"

namespace distro::transport {

enum class SendResult : std::uint8_t {
  sent,
  blocked,  ///< The carrier's queue is full; the message is still the caller's.
  gone,     ///< No such connection.
};

/// The way to one lower rank, which this rank dials. I/O thread.
class Link {
 public:
  enum class Change : std::uint8_t { none, opened, broke };

  Link() = default;
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;
  virtual ~Link() = default;

  /// `watch_space`: also wake when a message can be sent again.
  virtual void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) = 0;

  /// What happened to the connection next. After `broke`, receive what has arrived, then call
  /// drained().
  virtual Change next_change(Deadline now) = 0;
  virtual void drained(Deadline now) = 0;

  /// One frame, or false. A multi-part message comes back with an empty body, which no honest peer
  /// sends.
  virtual bool receive(zmq::message_t& body) = 0;
  virtual SendResult send(zmq::message_t& body) = 0;

  /// Frames wait here of which no poll item tells.
  [[nodiscard]] virtual bool pending() const noexcept { return false; }

  /// Deliver nothing more, not even what the carrier has already.
  virtual void forget() noexcept {}

  /// The peer has said goodbye.
  virtual void linger_briefly() noexcept {}

  /// Tries that failed in the carrier's greeting since the last call, and why the last one did;
  /// empty: none has, or a later one came through.
  virtual std::uint64_t take_rejected() { return 0; }
  [[nodiscard]] virtual std::string refusal() const { return ""; }

  /// Do what is due, such as dialling.
  virtual void work(Deadline now) = 0;
  [[nodiscard]] virtual Deadline next_timer() const noexcept = 0;
};

/// This rank's own endpoint, to which all higher ranks dial, and the maker of links to lower ones.
/// I/O thread.
class Listener {
 public:
  struct Lost {
    int peer;
    std::string reason;
  };
  struct Carried {
    std::uint64_t bytes_sent;
    std::uint64_t bytes_received;
  };

  Listener() = default;
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;
  virtual ~Listener() = default;

  [[nodiscard]] virtual const std::string& endpoint() const noexcept = 0;

  /// All addresses are known; called once, before the first dial.
  virtual void connect(const std::vector<PeerAddress>& /*addresses*/) {}
  virtual std::unique_ptr<Link> dial(int peer, const std::string& endpoint) = 0;

  /// `watch_space`: also wake when some connection can take messages again.
  virtual void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) = 0;

  /// One frame of a higher rank and the connection that it came over, named by a text that no peer
  /// can choose and no later connection has. As Link::receive.
  virtual bool receive(std::string& route, zmq::message_t& body) = 0;
  virtual SendResult send(const std::string& route, zmq::message_t& body) = 0;

  /// The connection over which the last frame came is a peer's: what it sends is wanted.
  virtual void recognise() {}

  /// Whom the carrier vouches for as the sender of this frame, by the key of its connection or as
  /// the relay says (-1: nobody); empty: this carrier has no keys.
  [[nodiscard]] virtual std::optional<int> authenticated(const std::string& /*route*/,
                                                         const zmq::message_t& /*body*/) const {
    return std::nullopt;
  }

  /// Connections that ended before they had brought a frame, since the last call; and how many of
  /// them there were at all with why the last did, as text; empty: none.
  virtual std::uint64_t take_rejected() { return 0; }
  [[nodiscard]] virtual std::string refusal() const { return ""; }

  /// Before connect() nobody can be recognised, but what strangers do must not pile up: greetings
  /// are kept for receive(), up to a number, and the rest is dropped.
  virtual void append_early_items(std::vector<zmq::pollitem_t>& /*items*/) {}
  virtual void sort_early() {}

  /// Whether some connection broke since the last call.
  virtual bool take_disconnects() = 0;

  /// A peer that the carrier knows to be lost for good.
  virtual std::optional<Lost> take_lost() { return std::nullopt; }

  /// Hand over what waits here for all peers together; called before frames are sent and after.
  /// Returns when to be called again without any other event.
  virtual Deadline flush(Deadline /*now*/) { return Deadline::max(); }

  /// Nothing waits here.
  [[nodiscard]] virtual bool flushed() const noexcept { return true; }

  /// What keeps this rank from `peer` and others at the moment; empty if it knows of nothing.
  [[nodiscard]] virtual std::string trouble(int /*peer*/, Deadline /*now*/) const { return ""; }

  /// What the carrier itself counts, if it does.
  [[nodiscard]] virtual std::optional<Carried> carried() { return std::nullopt; }
};

}  // namespace distro::transport
