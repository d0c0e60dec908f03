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

/// The DEALER that dials one lower rank: it reconnects by itself, and is made anew when ZeroMQ has
/// given it up (after a frame above MAXMSGSIZE or a failed handshake ZeroMQ never retries). I/O
/// thread.
class Dialer {
 public:
  Dialer(zmq::context_t& context, const ChannelConfig& config, std::string endpoint);
  ~Dialer();
  Dialer(const Dialer&) = delete;
  Dialer& operator=(const Dialer&) = delete;

  enum class Change { none, opened, broke };

  void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space);

  /// What the monitor reports next. inproc: one `opened` at the start, nothing else ever.
  Change next_change(Deadline now);

  /// As Acceptor::receive.
  bool receive(zmq::message_t& body);
  SendResult send(zmq::message_t& body);

  /// Make a socket that was given up anew when its time has come.
  void work(Deadline now);
  [[nodiscard]] Deadline next_timer() const noexcept { return renew_at_; }

 private:
  void open();
  void expect_retry(Deadline now);

  zmq::context_t& context_;
  const ChannelConfig& config_;
  std::string endpoint_;
  zmq::socket_t dealer_;
  std::optional<SocketMonitor> monitor_;
  bool inproc_opened_ = false;
  bool open_ = false;
  Deadline renew_at_ = Deadline::max();
  unsigned renewals_ = 0;  // since the connection was last open
  std::minstd_rand jitter_;
};

}  // namespace distro::transport
