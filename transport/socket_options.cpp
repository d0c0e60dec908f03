#include "transport/socket_options.h"

#include <fmt/format.h>
#include <sodium.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "transport/frame.h"
#include "transport/relay_frame.h"

namespace distro::transport {
namespace {

// A heartbeat that stays unanswered for so many intervals ends the connection. Fewer: a chunk on a
// slow link is taken for a dead peer; more: a vanished host is noticed late.
constexpr int kMissedHeartbeats = 6;

// Above 65.5 s ZeroMQ's field overflows (issue 4226).
constexpr std::chrono::milliseconds kLongestTtl{60'000};

// Shorter: slow links never finish the greeting of ZeroMQ; longer: half-open strangers stay.
constexpr int kHandshakeMs = 10'000;
// Shorter: far hosts are never reached; longer: a lost SYN costs that much.
constexpr int kConnectMs = 5'000;
// How long TCP keeps unacknowledged bytes. Shorter: an outage of a home link breaks connections;
// longer: a vanished host is noticed late.
constexpr int kTcpSilenceMs = 30'000;
// Between tries to connect. Shorter: a peer that is not up yet is hammered; longer: start-up takes
// longer.
constexpr int kReconnectMs = 200;
constexpr int kReconnectMaxMs = 10'000;

// ZMQ_ZAP_ENFORCE_DOMAIN: every libzmq since 4.3 has the option, its header only with the draft
// ones.
constexpr int kZapEnforceDomain = 93;

}  // namespace

void set_socket_options(zmq::socket_t& socket, const ChannelConfig& config, bool ipv6) {
  namespace opt = zmq::sockopt;
  const auto keepalive =
      static_cast<int>(std::min(config.keepalive, kLongestTtl / kMissedHeartbeats).count());
  // Not IMMEDIATE: with it a DEALER drops what it has received when its connection breaks, a
  // goodbye for instance.
  socket.set(opt::linger, 0);
  socket.set(opt::sndhwm, config.queue_frames);
  // A connection that breaks while its input stands still at a full queue ends the whole process,
  // when a heartbeat is due or ZeroMQ reconnects it before somebody reads (libzmq issue 3937). So
  // the queues have no limit: what waits in them is read at once, also from strangers, and the
  // sessions' windows bound what honest peers send.
  socket.set(opt::rcvhwm, 0);
  socket.set(opt::maxmsgsize,
             static_cast<std::int64_t>(config.chunk_bytes + kFrameAllowance +
                                       (config.relay.empty() ? 0 : kRelayAllowance)));
  socket.set(opt::heartbeat_ivl, keepalive);
  socket.set(opt::heartbeat_timeout, kMissedHeartbeats * keepalive);
  socket.set(opt::heartbeat_ttl, kMissedHeartbeats * keepalive);
  socket.set(opt::handshake_ivl, kHandshakeMs);
  socket.set(opt::connect_timeout, kConnectMs);
  socket.set(opt::tcp_maxrt, kTcpSilenceMs);
  socket.set(opt::reconnect_ivl, kReconnectMs);
  socket.set(opt::reconnect_ivl_max, kReconnectMaxMs);
  if (ipv6) {
    socket.set(opt::ipv6, true);
  }
}

void secure_server(zmq::socket_t& socket, const KeyPair& own, const std::string& domain) {
  namespace opt = zmq::sockopt;
  socket.set(opt::curve_server, true);
  // With its 0, so that ZeroMQ makes no copy to add one.
  socket.set(opt::curve_secretkey, zmq::const_buffer(own.secret.z85(), kZ85KeyBytes + 1));
  socket.set(opt::zap_domain, domain);
  // Else a domain without a handler lets everybody in.
  const int enforce = 1;
  if (::zmq_setsockopt(socket.handle(), kZapEnforceDomain, &enforce, sizeof enforce) != 0) {
    throw zmq::error_t();
  }
}

void secure_client(zmq::socket_t& socket, const KeyPair& own, const std::string& server_key) {
  namespace opt = zmq::sockopt;
  socket.set(opt::curve_serverkey, server_key);
  socket.set(opt::curve_publickey, own.public_key);
  socket.set(opt::curve_secretkey, zmq::const_buffer(own.secret.z85(), kZ85KeyBytes + 1));
}

std::string user_of(const zmq::message_t& message) {
  const char* user = ::zmq_msg_gets(message.handle(), "User-Id");
  return user == nullptr ? "" : user;
}

void close_lingering(zmq::socket_t& socket, std::chrono::milliseconds linger) noexcept {
  if (socket.handle() != nullptr) {
    const auto time = static_cast<int>(linger.count());
    ::zmq_setsockopt(socket.handle(), ZMQ_LINGER, &time, sizeof time);
    socket.close();
  }
}

SocketMonitor::SocketMonitor(zmq::context_t& context, zmq::socket_t& socket, int events)
    : monitored_(socket.handle()), pair_(context, zmq::socket_type::pair) {
  std::uint64_t name = 0;
  ::randombytes_buf(&name, sizeof name);
  const std::string endpoint = fmt::format("inproc://monitor-{:016x}", name);
  if (::zmq_socket_monitor(socket.handle(), endpoint.c_str(), events) != 0) {
    throw zmq::error_t();
  }
  pair_.set(zmq::sockopt::linger, 0);
  pair_.connect(endpoint);
}

SocketMonitor::~SocketMonitor() { ::zmq_socket_monitor(monitored_, nullptr, 0); }

std::optional<SocketMonitor::Event> SocketMonitor::next() {
  zmq::message_t message;
  if (!pair_.recv(message, zmq::recv_flags::dontwait)) {
    return std::nullopt;
  }
  std::uint16_t kind = 0;
  std::uint32_t value = 0;
  if (message.size() >= sizeof kind + sizeof value) {  // native byte order: it is of this process
    std::memcpy(&kind, message.data(), sizeof kind);
    std::memcpy(&value, message.data<std::byte>() + sizeof kind, sizeof value);
  }
  while (message.more() && pair_.recv(message, zmq::recv_flags::dontwait)) {
  }
  return Event{kind, value};
}

std::string handshake_error(const SocketMonitor::Event& event, bool keys) {
  if (event.kind == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH) {
    return "the key of the end that dials is not in the peers file of the end that listens";
  }
  if (event.kind == ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL) {
    return "it ended, or took too long, before the greeting was over";
  }
  switch (event.value) {
    case ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
      return keys ? "the other end has no keys" : "the other end wants keys, and this one has none";
    case ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
      return "it was not encrypted for the key that the peers file has of the end that listens";
    default:
      return "it did not follow ZeroMQ's protocol";
  }
}

}  // namespace distro::transport
