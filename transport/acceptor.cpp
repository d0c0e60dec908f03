#include "transport/acceptor.h"

#include <fmt/format.h>
#include <netinet/in.h>
#include <sodium.h>
#include <sys/socket.h>

#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstring>

#include "transport/dialer.h"
#include "transport/log.h"

namespace distro::transport {
namespace {

// Connections that a listening rank keeps open: each peer has one, and a few more while it
// reconnects. Fewer: a large group that comes back after an outage is refused for some seconds;
// more: strangers take more memory (a queue of 16 frames each) and descriptors.
constexpr std::size_t kConnectionsPerPeer = 4;
constexpr std::size_t kSpareConnections = 64;

// Port of this end of a TCP connection, 0 if it is none.
std::uint16_t local_port(int fd) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) {
    return 0;
  }
  if (address.ss_family == AF_INET) {
    sockaddr_in v4{};
    std::memcpy(&v4, &address, sizeof v4);
    return ntohs(v4.sin_port);
  }
  if (address.ss_family == AF_INET6) {
    sockaddr_in6 v6{};
    std::memcpy(&v6, &address, sizeof v6);
    return ntohs(v6.sin6_port);
  }
  return 0;
}

}  // namespace

Acceptor::Acceptor(zmq::context_t& context, const ChannelConfig& config)
    : context_(context),
      config_(config),
      router_(context, zmq::socket_type::router),
      connection_limit_(kConnectionsPerPeer * static_cast<std::size_t>(config.world_size) +
                        kSpareConnections) {
  const bool ipv6 = config.carrier == Carrier::tcp && plan_tcp(config).ipv6;
  set_socket_options(router_, config, ipv6);
  router_.set(zmq::sockopt::router_mandatory, true);
  if (config.carrier != Carrier::inproc) {
    monitor_.emplace(context, router_, ZMQ_EVENT_ACCEPTED | ZMQ_EVENT_DISCONNECTED);
  }
  bind(config);
}

Acceptor::~Acceptor() {
  monitor_.reset();
  close_lingering(router_, kLinger);
}

std::unique_ptr<Link> Acceptor::dial(int /*peer*/, const std::string& endpoint) {
  return std::make_unique<Dialer>(context_, config_, endpoint);
}

void Acceptor::bind(const ChannelConfig& config) {
  if (config.carrier == Carrier::tcp) {
    bind_tcp(config);
    return;
  }
  if (config.carrier == Carrier::ipc) {
    directory_ = std::make_unique<SocketDirectory>();
    endpoint_ = directory_->endpoint(config.rank);
  } else {
    std::uint64_t name = 0;
    ::randombytes_buf(&name, sizeof name);
    endpoint_ = fmt::format("inproc://distro-{:016x}", name);
  }
  try {
    router_.bind(endpoint_);
  } catch (const zmq::error_t& error) {
    throw ConfigError(
        fmt::format("rank {}: cannot bind to {}: {}", config.rank, endpoint_, error.what()));
  }
}

void Acceptor::bind_tcp(const ChannelConfig& config) {
  const TcpPlan plan = plan_tcp(config);
  for (const std::uint16_t port : plan.ports) {
    const std::string endpoint = tcp_endpoint(plan.bind_host, port);
    if (::zmq_bind(router_.handle(), endpoint.c_str()) == 0) {
      const std::string bound = router_.get(zmq::sockopt::last_endpoint);
      std::uint16_t bound_port = 0;
      std::from_chars(bound.data() + bound.rfind(':') + 1, bound.data() + bound.size(), bound_port);
      endpoint_ = tcp_endpoint(plan.advertise_host, bound_port);
      port_ = bound_port;
      return;
    }
    if (zmq_errno() != EADDRINUSE) {
      throw ConfigError(fmt::format(
          "{}: cannot bind to {}: {}; choose an address or interface of this host (DISTRO_BIND), "
          "and ports that it may use (DISTRO_PORTS)",
          name_of(config), endpoint, zmq_strerror(zmq_errno())));
    }
  }
  throw ConfigError(fmt::format("{}: all ports from {} to {} of {} are in use: widen DISTRO_PORTS",
                                name_of(config), config.first_port, config.last_port,
                                plan.bind_host));
}

void Acceptor::append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) {
  items.push_back({router_.handle(), 0, ZMQ_POLLIN, 0});
  if (monitor_) {
    items.push_back({monitor_->handle(), 0, ZMQ_POLLIN, 0});
  }
  if (watch_space) {
    // Readable while ZeroMQ has a command for the socket, among them "this pipe has space again".
    items.push_back({nullptr, router_.get(zmq::sockopt::fd), ZMQ_POLLIN, 0});
  }
}

bool Acceptor::receive(std::string& route, zmq::message_t& body) {
  zmq::message_t id;
  if (!router_.recv(id, zmq::recv_flags::dontwait)) {
    return false;
  }
  route.assign(id.data<char>(), id.size());
  body.rebuild();
  if (!id.more() || !router_.recv(body, zmq::recv_flags::dontwait)) {
    return true;
  }
  if (body.more()) {
    zmq::message_t rest;
    do {
      rest.rebuild();
    } while (router_.recv(rest, zmq::recv_flags::dontwait) && rest.more());
    body.rebuild();
  }
  return true;
}

SendResult Acceptor::send(const std::string& route, zmq::message_t& body) {
  if (::zmq_send(router_.handle(), route.data(), route.size(), ZMQ_SNDMORE | ZMQ_DONTWAIT) < 0) {
    const int error = zmq_errno();
    if (error == EAGAIN || error == EINTR) {
      return SendResult::blocked;
    }
    if (error == EHOSTUNREACH) {
      return SendResult::gone;
    }
    throw zmq::error_t();
  }
  // The first part has chosen the connection and made sure of the space; the second cannot block.
  router_.send(body, zmq::send_flags::dontwait);
  return SendResult::sent;
}

void Acceptor::on_accepted(int fd) {
  connections_.insert(fd);
  // ZeroMQ cannot end one connection of a ROUTER, but it notices the end of the stream. By now the
  // descriptor may be another's, so only one of our own port is touched: at worst a peer dials
  // anew.
  if (connections_.size() > connection_limit_ && port_ != 0 && local_port(fd) == port_) {
    ::shutdown(fd, SHUT_RDWR);
    log_once(LogLevel::warning, "connections/" + endpoint_,
             fmt::format("[distro {}] {} connections to {}, more than its ranks can need: "
                         "strangers reach this port. Further ones are ended (logged once)",
                         name_of(config_), connections_.size(), endpoint_));
  }
}

bool Acceptor::take_disconnects() {
  bool any = false;
  while (monitor_) {
    const auto event = monitor_->next();
    if (!event) {
      break;
    }
    const int fd = static_cast<int>(event->value);
    if (event->kind == ZMQ_EVENT_ACCEPTED) {
      on_accepted(fd);
    } else {
      connections_.erase(fd);
      any = true;
    }
  }
  return any;
}

}  // namespace distro::transport
