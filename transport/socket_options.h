#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <zmq.hpp>

#include "transport/channel.h"

namespace distro::transport {

/// Options of every ROUTER and DEALER of a channel, to be set before bind or connect.
void set_socket_options(zmq::socket_t& socket, const ChannelConfig& config, bool ipv6);

/// How long ZeroMQ delivers in the background what was handed to it before a socket was closed.
/// Shorter: an abort or a goodbye on a slow link is cut off; longer: a process takes that long to
/// exit.
inline constexpr std::chrono::milliseconds kLinger{1'000};
/// The same for a peer that has said goodbye and may be gone: it only needs an acknowledgement.
inline constexpr std::chrono::milliseconds kLingerAfterGoodbye{100};

void close_lingering(zmq::socket_t& socket, std::chrono::milliseconds linger) noexcept;

/// Events of one socket, by a PAIR of its own. inproc sockets have none. To be destroyed before the
/// socket is closed: ZeroMQ's thread hangs, and with it all connections, when it reports an event
/// that nobody is there to take.
class SocketMonitor {
 public:
  /// Start before bind or connect. `events`: a mask of ZMQ_EVENT_...
  SocketMonitor(zmq::context_t& context, zmq::socket_t& socket, int events);
  ~SocketMonitor();
  SocketMonitor(const SocketMonitor&) = delete;
  SocketMonitor& operator=(const SocketMonitor&) = delete;

  [[nodiscard]] void* handle() noexcept { return pair_.handle(); }

  struct Event {
    int kind;             ///< ZMQ_EVENT_...
    std::uint32_t value;  ///< The file descriptor, for those events that have one.
  };

  /// The next event, or an empty optional.
  std::optional<Event> next();

 private:
  void* monitored_;
  zmq::socket_t pair_;
};

}  // namespace distro::transport
