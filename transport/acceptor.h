#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>
#include <zmq.hpp>

#include "transport/bind.h"
#include "transport/channel.h"
#include "transport/socket_options.h"

namespace distro::transport {

enum class SendResult {
  sent,
  blocked,  ///< ZeroMQ's queue is full; the message is still the caller's.
  gone,     ///< No such connection.
};

/// The bound ROUTER of a channel, to which all higher ranks dial. Peers are told apart by the
/// routing ids that ZeroMQ assigns, which no peer can choose. I/O thread.
class Acceptor {
 public:
  /// Binds. Throws ConfigError.
  Acceptor(zmq::context_t& context, const ChannelConfig& config);
  ~Acceptor();
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  [[nodiscard]] const std::string& endpoint() const noexcept { return endpoint_; }

  /// `watch_space`: also wake when some connection can take messages again (a ROUTER cannot say
  /// which).
  void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space);

  /// One frame and the routing id it came from. A multi-part message comes back with an empty body,
  /// which no honest peer sends.
  bool receive(std::string& route, zmq::message_t& body);

  SendResult send(const std::string& route, zmq::message_t& body);

  /// Whether some connection broke since the last call. ZeroMQ does not say whose.
  bool take_disconnects();

 private:
  void bind(const ChannelConfig& config);
  void bind_tcp(const ChannelConfig& config);

  std::unique_ptr<SocketDirectory> directory_;  // outlives the socket
  zmq::socket_t router_;
  std::optional<SocketMonitor> monitor_;
  std::string endpoint_;
};

}  // namespace distro::transport
