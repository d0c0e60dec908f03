#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>
#include <zmq.hpp>

#include "transport/bind.h"
#include "transport/channel.h"
#include "transport/link.h"
#include "transport/socket_options.h"

namespace distro::transport {

/// The bound ROUTER of a channel, to which all higher ranks dial. Peers are told apart by the
/// routing ids that ZeroMQ assigns, which no peer can choose. I/O thread.
class Acceptor final : public Listener {
 public:
  /// Binds. Throws ConfigError.
  Acceptor(zmq::context_t& context, const ChannelConfig& config);
  ~Acceptor() override;
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  [[nodiscard]] const std::string& endpoint() const noexcept override { return endpoint_; }
  /// How many connections may be open at once; further ones are ended.
  void limit_connections(std::size_t limit) noexcept { connection_limit_ = limit; }
  std::unique_ptr<Link> dial(int peer, const std::string& endpoint) override;
  /// A ROUTER cannot say which connection has space again.
  void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) override;
  bool receive(std::string& route, zmq::message_t& body) override;
  SendResult send(const std::string& route, zmq::message_t& body) override;
  /// ZeroMQ does not say whose connection broke.
  bool take_disconnects() override;

 private:
  void bind(const ChannelConfig& config);
  void bind_tcp(const ChannelConfig& config);
  void on_accepted(int fd);

  zmq::context_t& context_;
  const ChannelConfig& config_;
  std::unique_ptr<SocketDirectory> directory_;  // outlives the socket
  zmq::socket_t router_;
  std::optional<SocketMonitor> monitor_;
  std::string endpoint_;
  std::uint16_t port_ = 0;     // tcp
  std::set<int> connections_;  // open ones, of peers and strangers
  std::size_t connection_limit_;
};

}  // namespace distro::transport
