#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "transport/abi.h"
#include "transport/channel.h"
#include "transport/link.h"
#include "transport/plugin.h"

namespace distro::transport {

/// One channel of a third-party transport, with everything that comes out of the library checked.
/// Its errors and broken promises are TransportErrors that name library, function and rank. One
/// thread at a time.
class PluginEndpoint {
 public:
  struct Event {
    distro_transport_event_kind kind;
    int peer;
    std::span<const std::byte> data;  ///< Valid until the next call.
    std::string text;                 ///< Printable.
  };

  /// Opens. Throws ConfigError. `config` must outlive it.
  explicit PluginEndpoint(const ChannelConfig& config);
  ~PluginEndpoint() = default;
  PluginEndpoint(const PluginEndpoint&) = delete;
  PluginEndpoint& operator=(const PluginEndpoint&) = delete;

  [[nodiscard]] const std::string& address() const noexcept { return address_; }
  [[nodiscard]] int poll_fd() const noexcept { return poll_fd_; }

  void connect(const std::vector<PeerAddress>& addresses);
  SendResult send(int peer, std::span<const std::byte> frame);
  std::optional<Event> receive();
  [[nodiscard]] std::optional<Listener::Carried> counters();

 private:
  struct Closer {
    const Plugin* plugin;
    void operator()(distro_transport_channel* channel) const noexcept;
  };

  template <typename Function>
  auto call(const char* function, Function&& body);
  [[noreturn]] void fail(const char* function, const std::string& why) const;
  void open();
  void read_address();

  const ChannelConfig& config_;
  const distro_transport& table_;
  const std::size_t max_frame_bytes_;
  std::unique_ptr<distro_transport_channel, Closer> channel_;
  std::string address_;
  int poll_fd_ = -1;
};

}  // namespace distro::transport
