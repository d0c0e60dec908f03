#pragma once

#include <optional>
#include <random>
#include <string>
#include <vector>
#include <zmq.hpp>

#include "transport/acceptor.h"
#include "transport/channel.h"
#include "transport/socket_options.h"

namespace distro::transport {

/// The DEALER that dials one lower rank. ZeroMQ retries until the first connection; each connection
/// after that gets a fresh socket, since a socket that reconnects by itself would send what was
/// queued for the old connection, and one that ZeroMQ has given up (a frame above MAXMSGSIZE, a
/// failed handshake) never retries. I/O thread.
class Dialer {
 public:
  Dialer(zmq::context_t& context, const ChannelConfig& config, std::string endpoint);
  ~Dialer();
  Dialer(const Dialer&) = delete;
  Dialer& operator=(const Dialer&) = delete;

  enum class Change { none, opened, broke };

  void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space);

  /// What the monitor reports next. After `broke`, receive what has arrived, then call drained().
  /// inproc: one `opened` at the start, nothing else ever.
  Change next_change(Deadline now);
  void drained(Deadline now);

  /// As Acceptor::receive.
  bool receive(zmq::message_t& body);
  SendResult send(zmq::message_t& body);

  /// Deliver nothing more, not even what ZeroMQ has already.
  void forget() noexcept { phase_ = Phase::waiting; }

  /// The peer has said goodbye.
  void linger_briefly() noexcept { linger_ = kLingerAfterGoodbye; }

  /// Dial when the time has come.
  void work(Deadline now);
  [[nodiscard]] Deadline next_timer() const noexcept { return at_; }

 private:
  enum class Phase {
    waiting,   // a fresh socket, to be connected at at_
    dialling,  // ZeroMQ tries
    open,
    doubtful,  // a try failed; if ZeroMQ does not say by at_ that it makes another, the socket is
               // dead
  };

  void renew(Deadline now);

  zmq::context_t& context_;
  const ChannelConfig& config_;
  std::string endpoint_;
  zmq::socket_t dealer_;
  std::optional<SocketMonitor> monitor_;
  Phase phase_ = Phase::waiting;
  Deadline at_ = Deadline::max();
  unsigned renewals_ = 0;  // since the connection was last open
  bool inproc_opened_ = false;
  std::chrono::milliseconds linger_ = kLinger;
  std::minstd_rand jitter_;
};

}  // namespace distro::transport
