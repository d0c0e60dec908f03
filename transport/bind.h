#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "transport/channel.h"

namespace distro::transport {

/// Where a tcp rank binds, and what it tells its peers.
struct TcpPlan {
  std::string bind_host;       ///< An IP address; IPv6 without brackets.
  std::string advertise_host;  ///< An IP address or a name.
  bool ipv6 = false;
  std::vector<std::uint16_t> ports;  ///< To try in this order; 0: any free one.
};

struct Endpoint {
  std::string host;  ///< Without brackets.
  std::uint16_t port;
};

/// Of "tcp://host:port"; empty if it is none. `any_port`: the port may be 0.
std::optional<Endpoint> split_endpoint(const std::string& text, bool any_port = false);

/// Apply the binding rule: loopback only, unless there are keys or `insecure`. Throws ConfigError
/// that says what to do.
TcpPlan plan_tcp(const ChannelConfig& config);

/// "rank 2", or "the relay": who binds, in error texts.
std::string name_of(const ChannelConfig& config);

/// Whether peers on other hosts can reach this address or interface. Throws ConfigError.
bool is_open(const ChannelConfig& config);

/// Whether this is the address that stands for all of a host's ("0.0.0.0", "::"), which peers
/// cannot connect to.
bool is_every_address(const std::string& text);

/// Whether what peers are told to connect to is an IP address or a name that resolves. Asks the
/// name service, so not on the I/O thread. Throws ConfigError.
void check_advertised(const ChannelConfig& config);

/// Whether the relay may be dialled: its endpoint is one, and with keys, on loopback, or
/// `insecure`. Asks the name service, so not on the I/O thread. Throws ConfigError.
void check_relay(const ChannelConfig& config);

/// The same for what `peer` has published, before it is dialled. Throws PeerError of the peer.
void check_endpoint(const ChannelConfig& config, int peer, const std::string& endpoint);

/// Where to dial a peer of which the peers file says `given` ("tcp://host", "tcp://host:port", or
/// nothing) and the store `published`: a host alone takes the port that was published.
std::string endpoint_to_dial(const std::string& given, const std::string& published);

std::string tcp_endpoint(std::string_view host, std::uint16_t port);

/// A new directory that only this user can enter, for the Unix socket of one rank; removed with the
/// object. Its name says whose it is, and directories that killed processes left are removed first.
/// Throws ConfigError if it cannot be made or its path is too long for a socket.
class SocketDirectory {
 public:
  SocketDirectory();
  ~SocketDirectory();
  SocketDirectory(const SocketDirectory&) = delete;
  SocketDirectory& operator=(const SocketDirectory&) = delete;

  [[nodiscard]] std::string endpoint(int rank) const;

 private:
  std::filesystem::path path_;
};

}  // namespace distro::transport
