#pragma once

#include <optional>
#include <zmq.hpp>

#include "transport/channel.h"

namespace distro::transport {

/// Options of every ROUTER and DEALER of a channel, to be set before bind or connect.
void set_socket_options(zmq::socket_t& socket, const ChannelConfig& config, bool ipv6);

/// Close, and let ZeroMQ deliver for a moment in the background what was handed to it.
void close_lingering(zmq::socket_t& socket) noexcept;

/// Events of one socket, by a PAIR of its own. inproc sockets have none.
class SocketMonitor {
 public:
  struct Event {
    int kind = 0;  ///< ZMQ_EVENT_...
  };

  /// Start before bind or connect. `events`: a mask of ZMQ_EVENT_...
  SocketMonitor(zmq::context_t& context, zmq::socket_t& socket, int events);

  [[nodiscard]] void* handle() noexcept { return pair_.handle(); }

  /// The next event, or an empty optional.
  std::optional<Event> next();

 private:
  zmq::socket_t pair_;
};

}  // namespace distro::transport
