#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>
#include <zmq.hpp>

#include "transport/bind.h"
#include "transport/channel.h"
#include "transport/link.h"
#include "transport/socket_options.h"
#include "transport/zap.h"

namespace distro::transport {

/// The bound ROUTER of a channel, to which all higher ranks dial. Peers are told apart by the
/// routing ids that ZeroMQ assigns, which no peer can choose; with keys, ZeroMQ lets nobody in but
/// them, and says of each frame whose key it came with. I/O thread.
class Acceptor final : public Listener {
 public:
  /// Binds. `zap`: the context's, which a channel with keys needs. Throws ConfigError.
  Acceptor(zmq::context_t& context, const ChannelConfig& config, ZapHandler* zap = nullptr);
  /// With keys, lets these in in place of the ranks that dial this one; their ids are numbers.
  Acceptor(zmq::context_t& context, const ChannelConfig& config, ZapHandler* zap,
           const ZapUsers& users);
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
  [[nodiscard]] std::optional<int> authenticated(const std::string& route,
                                                 const zmq::message_t& body) const override;
  void append_early_items(std::vector<zmq::pollitem_t>& items) override;
  void sort_early() override;
  void recognise() override;
  std::uint64_t take_rejected() override { return std::exchange(newly_rejected_, 0); }
  [[nodiscard]] std::string refusal() const override;
  /// ZeroMQ does not say whose connection broke.
  bool take_disconnects() override;

 private:
  // With keys: lets some in, for as long as it lives.
  class Domain {
   public:
    Domain(ZapHandler& zap, const std::string& owner, const ZapUsers& users);
    ~Domain();
    Domain(const Domain&) = delete;
    Domain& operator=(const Domain&) = delete;
    [[nodiscard]] const std::string& name() const noexcept { return name_; }

   private:
    ZapHandler& zap_;
    std::string name_;
  };

  struct Connection {
    std::uint64_t number;  // in order of their coming
    bool proven = false;   // has brought a frame
    bool known = false;    // it is a peer's
    bool ended = false;    // by this rank; ZeroMQ has not noticed yet
    unsigned frames = 0;   // brought while it was not known
  };

  // Where a frame came from. A descriptor alone may be another's by now.
  struct Origin {
    int fd = -1;
    std::uint64_t number = 0;
  };

  struct Early {
    std::string route;
    zmq::message_t body;
    Origin origin;
  };

  bool receive_now(std::string& route, zmq::message_t& body);
  void bind(const ChannelConfig& config);
  void bind_tcp(const ChannelConfig& config);
  void note_frame(int fd);
  void end(int fd, Connection& connection);
  void read_events();
  void on_accepted(int fd);
  void on_disconnected(int fd);
  void on_handshake_failed(const SocketMonitor::Event& event);

  zmq::context_t& context_;
  const ChannelConfig& config_;
  std::unique_ptr<SocketDirectory> directory_;  // outlives the socket
  std::optional<Domain> domain_;
  zmq::socket_t router_;
  std::optional<SocketMonitor> monitor_;
  std::deque<Early> early_;
  Origin last_;  // of the frame last received
  std::string endpoint_;
  std::uint16_t port_ = 0;                 // tcp
  std::map<int, Connection> connections_;  // open ones, of peers and strangers, by descriptor
  std::size_t connection_limit_;
  bool events_read_ = false;   // since frames were last read to their end
  bool disconnected_ = false;  // since take_disconnects()
  std::uint64_t accepted_ = 0;
  std::uint64_t rejected_ = 0;
  std::uint64_t newly_rejected_ = 0;
  std::string why_rejected_;
};

}  // namespace distro::transport
