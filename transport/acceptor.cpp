#include "transport/acceptor.h"

#include <fmt/format.h>
#include <netinet/in.h>
#include <sodium.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "transport/dialer.h"
#include "transport/frame.h"
#include "transport/log.h"

namespace distro::transport {
namespace {

// Connections that a listening rank keeps open: each peer has one, and a few more while it
// reconnects. Fewer: a large group that comes back after an outage is refused for some seconds;
// more: strangers take more memory and descriptors.
constexpr std::size_t kConnectionsPerPeer = 4;
constexpr std::size_t kSpareConnections = 64;

// Frames of a connection that is not a peer's until it is ended: what it sends must be read as fast
// as it comes. Fewer: a peer that greets again and again because this rank is busy has to dial
// anew; more: strangers take more time and memory.
constexpr unsigned kFramesOfAStranger = 64;

// Frames looked at at once before the ranks meet. Fewer: more rounds of the I/O thread; more: a
// flood delays other channels.
constexpr int kEarlyBatch = 256;

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

Acceptor::Domain::Domain(ZapHandler& zap, const std::string& owner, const ZapUsers& users)
    : zap_(zap) {
  // Strangers never learn it; the number tells the channels of this process apart.
  std::uint64_t number = 0;
  ::randombytes_buf(&number, sizeof number);
  name_ = fmt::format("{} ({:016x})", owner, number);
  zap_.add_domain(name_, users);
}

Acceptor::Domain::~Domain() { zap_.remove_domain(name_); }

namespace {

ZapUsers users_who_dial(const ChannelConfig& config) {
  ZapUsers users;
  const auto& keys = config.keys->public_by_rank;
  for (int rank = config.rank + 1; rank < static_cast<int>(keys.size()); ++rank) {
    const auto& key = keys[static_cast<std::size_t>(rank)];
    if (is_neighbour(config, rank) && !key.empty()) {
      users.emplace(key, std::to_string(rank));
    }
  }
  return users;
}

}  // namespace

Acceptor::Acceptor(zmq::context_t& context, const ChannelConfig& config, ZapHandler* zap)
    : Acceptor(context, config, zap, config.keys ? users_who_dial(config) : ZapUsers{}) {}

Acceptor::Acceptor(zmq::context_t& context, const ChannelConfig& config, ZapHandler* zap,
                   const ZapUsers& users)
    : context_(context),
      config_(config),
      router_(context, zmq::socket_type::router),
      connection_limit_(kConnectionsPerPeer * static_cast<std::size_t>(config.world_size) +
                        kSpareConnections) {
  const bool ipv6 = config.carrier == Carrier::tcp && plan_tcp(config).ipv6;
  set_socket_options(router_, config, ipv6);
  router_.set(zmq::sockopt::router_mandatory, true);
  if (config.carrier != Carrier::inproc) {
    monitor_.emplace(context, router_,
                     ZMQ_EVENT_ACCEPTED | ZMQ_EVENT_DISCONNECTED | kHandshakeFailed);
  }
  if (config.keys) {
    if (zap == nullptr) {
      throw ConfigError("a channel with keys needs a handler that checks them");
    }
    domain_.emplace(*zap, name_of(config), users);
    secure_server(router_, config.keys->own, domain_->name());
  }
  bind(config);
}

Acceptor::~Acceptor() {
  monitor_.reset();
  close_lingering(router_, kLinger);
}

std::unique_ptr<Link> Acceptor::dial(int peer, const std::string& endpoint) {
  return std::make_unique<Dialer>(context_, config_, peer, endpoint);
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

void Acceptor::append_early_items(std::vector<zmq::pollitem_t>& items) {
  append_poll_items(items, false);
}

void Acceptor::sort_early() {
  Early early;
  for (int count = 0; count < kEarlyBatch && receive_now(early.route, early.body); ++count) {
    if (early.body.size() != kHeaderBytes + kGreetingBytes) {
      continue;
    }
    if (early_.size() == connection_limit_) {
      early_.pop_front();
    }
    early.origin = last_;
    early_.push_back(std::move(early));
    early = {};
  }
}

std::optional<int> Acceptor::authenticated(const std::string& /*route*/,
                                           const zmq::message_t& body) const {
  if (!domain_) {
    return std::nullopt;
  }
  const std::string user = user_of(body);
  int rank = -1;
  std::from_chars(user.data(), user.data() + user.size(), rank);
  return rank;
}

bool Acceptor::receive(std::string& route, zmq::message_t& body) {
  if (!early_.empty()) {
    route = std::move(early_.front().route);
    body = std::move(early_.front().body);
    last_ = early_.front().origin;
    early_.pop_front();
    return true;
  }
  return receive_now(route, body);
}

bool Acceptor::receive_now(std::string& route, zmq::message_t& body) {
  if (!std::exchange(events_read_, true)) {
    read_events();
  }
  zmq::message_t id;
  if (!router_.recv(id, zmq::recv_flags::dontwait)) {
    events_read_ = false;
    return false;
  }
  route.assign(id.data<char>(), id.size());
  body.rebuild();
  if (!id.more() || !router_.recv(body, zmq::recv_flags::dontwait)) {
    return true;
  }
  note_frame(::zmq_msg_get(body.handle(), ZMQ_SRCFD));
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
  connections_[fd] = Connection{++accepted_};
  if (connections_.size() <= connection_limit_ || port_ == 0) {
    return;
  }
  // Ended is the oldest that has not said anything, or nothing that a peer says, so that strangers
  // cannot keep peers out; if all are peers', the new one.
  const auto older = [](const auto& a, const auto& b) {
    const auto rank = [](const Connection& c) { return std::tuple(c.known, c.proven, c.number); };
    return !a.second.ended && (b.second.ended || rank(a.second) < rank(b.second));
  };
  auto victim = std::ranges::min_element(connections_, older);
  if (victim->second.known) {
    victim = connections_.find(fd);
  }
  end(victim->first, victim->second);
  log_once(LogLevel::warning, "connections/" + endpoint_,
           fmt::format("[distro {}] {} connections to {}, more than its ranks can need: strangers "
                       "reach this port. The oldest of them are ended (logged once)",
                       name_of(config_), connections_.size(), endpoint_));
}

// ZeroMQ cannot end one connection of a ROUTER, but it notices the end of the stream. By now the
// descriptor may be another's, so only one of our own port is touched: at worst a peer dials anew.
void Acceptor::end(int fd, Connection& connection) {
  connection.ended = true;
  if (local_port(fd) == port_) {
    ::shutdown(fd, SHUT_RDWR);
  }
}

void Acceptor::on_disconnected(int fd) {
  const auto connection = connections_.find(fd);
  if (connection == connections_.end()) {
    return;
  }
  disconnected_ = disconnected_ || connection->second.known;  // nobody looks for strangers
  if (!connection->second.proven) {
    ++rejected_;
    ++newly_rejected_;
  }
  connections_.erase(connection);
}

void Acceptor::on_handshake_failed(const SocketMonitor::Event& event) {
  why_rejected_ = handshake_error(event, domain_.has_value());
  // Without keys an end of a connection says nothing of who it was.
  const bool broken = event.kind == ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL && !domain_;
  log_once(broken ? LogLevel::debug : LogLevel::warning,
           fmt::format("handshake/{}/{}", endpoint_, why_rejected_),
           fmt::format("[distro {}] refused a connection to {}: {} (logged once; "
                       "rejected_connections counts them)",
                       name_of(config_), endpoint_, why_rejected_));
}

std::string Acceptor::refusal() const {
  if (!domain_ || rejected_ == 0) {
    return "";
  }
  return fmt::format(
      "{} connections to {} were refused meanwhile{}. If they were that rank's: compare its key "
      "with its line in the peers files of both",
      rejected_, endpoint_, why_rejected_.empty() ? "" : ", the last because " + why_rejected_);
}

// What happened to a connection before it brought a frame is told before that frame comes, so that
// a descriptor always means the right one.
void Acceptor::note_frame(int fd) {
  auto found = connections_.find(fd);
  if (found == connections_.end()) {
    read_events();
    found = connections_.find(fd);
  }
  last_ = {};
  if (found == connections_.end()) {
    return;
  }
  Connection& connection = found->second;
  last_ = {fd, connection.number};
  connection.proven = true;
  if (connection.known || connection.ended || port_ == 0) {
    return;
  }
  if (++connection.frames > kFramesOfAStranger) {
    end(fd, connection);
    log_once(LogLevel::warning, "strangers/" + endpoint_,
             fmt::format("[distro {}] ended a connection to {} that sent {} frames and is no "
                         "peer's (logged once)",
                         name_of(config_), endpoint_, connection.frames));
  }
}

void Acceptor::recognise() {
  const auto found = connections_.find(last_.fd);
  if (found != connections_.end() && found->second.number == last_.number) {
    found->second.known = true;
  }
}

void Acceptor::read_events() {
  while (monitor_) {
    const auto event = monitor_->next();
    if (!event) {
      return;
    }
    const int fd = static_cast<int>(event->value);
    if (event->kind == ZMQ_EVENT_ACCEPTED) {
      on_accepted(fd);
    } else if (event->kind == ZMQ_EVENT_DISCONNECTED) {
      on_disconnected(fd);
    } else {
      on_handshake_failed(*event);
    }
  }
}

bool Acceptor::take_disconnects() {
  read_events();
  events_read_ = false;
  return std::exchange(disconnected_, false);
}

}  // namespace distro::transport
