#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <zmq.hpp>

#include "transport/channel.h"
#include "transport/keys.h"

namespace distro::transport {

/// Options of every ROUTER and DEALER of a channel, to be set before bind or connect.
void set_socket_options(zmq::socket_t& socket, const ChannelConfig& config, bool ipv6);

/// Accept connections of those only whom the ZapHandler of the socket's context knows in this
/// domain. Before bind. Without a handler nobody can connect.
void secure_server(zmq::socket_t& socket, const KeyPair& own, const std::string& domain);

/// Connect to whoever has this key (Z85) only. Before connect.
void secure_client(zmq::socket_t& socket, const KeyPair& own, const std::string& server_key);

/// The user id that the ZapHandler gave whoever sent this message; empty: none.
std::string user_of(const zmq::message_t& message);

/// How long ZeroMQ delivers in the background what was handed to it before a socket was closed.
/// Shorter: an abort or a goodbye on a slow link is cut off; longer: a process takes that long to
/// exit.
inline constexpr std::chrono::milliseconds kLinger{1'000};
/// The same for a peer that has said goodbye and may be gone: it only needs an acknowledgement.
inline constexpr std::chrono::milliseconds kLingerAfterGoodbye{100};

void close_lingering(zmq::socket_t& socket, std::chrono::milliseconds linger) noexcept;

/// Events that say that a connection failed before ZeroMQ's greeting was over.
inline constexpr int kHandshakeFailed = ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL |
                                        ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL |
                                        ZMQ_EVENT_HANDSHAKE_FAILED_AUTH;

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
    std::uint32_t value;  ///< The file descriptor, for those events that have one; of a failed
                          ///< handshake its status or ZMQ_PROTOCOL_ERROR_...
  };

  /// The next event, or an empty optional.
  std::optional<Event> next();

 private:
  void* monitored_;
  zmq::socket_t pair_;
};

/// What a failed handshake (an event of kHandshakeFailed) means for the end that reports it.
/// `keys`: whether this end has some.
std::string handshake_error(const SocketMonitor::Event& event, bool keys);

}  // namespace distro::transport
