#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "transport/link.h"
#include "transport/plugin_endpoint.h"

namespace distro::transport {

/// A third-party transport in the place of ZeroMQ's sockets. The library tells of all peers in one
/// row; this sorts frames and changes by peer. The links that it makes refer to it. I/O thread.
class PluginListener final : public Listener {
 public:
  /// Opens the library's channel. Throws ConfigError.
  explicit PluginListener(const ChannelConfig& config);

  [[nodiscard]] const std::string& endpoint() const noexcept override { return plugin_.address(); }
  void connect(const std::vector<PeerAddress>& addresses) override { plugin_.connect(addresses); }
  std::unique_ptr<Link> dial(int peer, const std::string& endpoint) override;
  void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) override;
  bool receive(std::string& route, zmq::message_t& body) override;
  SendResult send(const std::string& route, zmq::message_t& body) override;
  bool take_disconnects() override;
  std::optional<Lost> take_lost() override;
  [[nodiscard]] std::optional<Carried> carried() override { return plugin_.counters(); }

 private:
  class PluginLink;

  struct Way {
    bool up = false;
    std::uint64_t connection = 0;  // counts up: each has a route of its own
    bool linked = false;           // a link takes the rest
    std::deque<Link::Change> changes;
    std::deque<zmq::message_t> frames;
  };

  [[nodiscard]] Way& way(int peer) { return ways_[static_cast<std::size_t>(peer)]; }
  [[nodiscard]] std::string route(int peer);
  void went_up(int peer);
  void went_down(int peer);

  const int rank_;
  PluginEndpoint plugin_;
  std::vector<Way> ways_;  // by rank
  std::deque<Lost> lost_;
  bool disconnects_ = false;
};

}  // namespace distro::transport
