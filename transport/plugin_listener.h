#pragma once

#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "transport/plugin_endpoint.h"
#include "transport/row_listener.h"

namespace distro::transport {

/// A third-party transport in the place of ZeroMQ's sockets. I/O thread.
class PluginListener final : public RowListener {
 public:
  /// Opens the library's channel. Throws ConfigError.
  explicit PluginListener(const ChannelConfig& config);

  [[nodiscard]] const std::string& endpoint() const noexcept override { return plugin_.address(); }
  void connect(const std::vector<PeerAddress>& addresses) override { plugin_.connect(addresses); }
  void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) override;
  bool receive(std::string& route, zmq::message_t& body) override;
  std::optional<Lost> take_lost() override;
  [[nodiscard]] std::optional<Carried> carried() override { return plugin_.counters(); }

 private:
  SendResult give(int peer, zmq::message_t& body) override;
  /// The library's descriptor once more: Mesh asks each link for its own events.
  void append_link_items(std::vector<zmq::pollitem_t>& items, bool watch_space) override {
    append_poll_items(items, watch_space);
  }

  PluginEndpoint plugin_;
  std::deque<Lost> lost_;
};

}  // namespace distro::transport
