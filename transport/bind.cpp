#include "transport/bind.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <system_error>

#include "transport/host.h"

namespace distro::transport {
namespace {

struct Address {
  std::string text;
  bool ipv6 = false;
  bool loopback = false;
  bool wildcard = false;
};

Address describe(const in_addr& ip, std::string text) {
  const std::uint32_t bits = ntohl(ip.s_addr);
  return {std::move(text), false, (bits >> 24) == 127, bits == 0};
}

Address describe(const in6_addr& ip, std::string text) {
  return {std::move(text), true, IN6_IS_ADDR_LOOPBACK(&ip) != 0, IN6_IS_ADDR_UNSPECIFIED(&ip) != 0};
}

std::optional<Address> parse_ip(const std::string& text) {
  in_addr v4{};
  if (::inet_pton(AF_INET, text.c_str(), &v4) == 1) {
    return describe(v4, text);
  }
  in6_addr v6{};
  if (::inet_pton(AF_INET6, text.c_str(), &v6) == 1) {
    return describe(v6, text);
  }
  return std::nullopt;
}

// An interface's first IPv4 address, or its first IPv6 address that needs no scope.
std::optional<Address> find_interface(const std::string& name) {
  ifaddrs* raw = nullptr;
  if (::getifaddrs(&raw) != 0) {
    return std::nullopt;
  }
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> list(raw, &::freeifaddrs);
  std::optional<Address> found;
  for (const ifaddrs* entry = list.get(); entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || name != entry->ifa_name) {
      continue;
    }
    std::array<char, INET6_ADDRSTRLEN> text{};
    if (entry->ifa_addr->sa_family == AF_INET) {
      sockaddr_in address{};
      std::memcpy(&address, entry->ifa_addr, sizeof address);
      ::inet_ntop(AF_INET, &address.sin_addr, text.data(), text.size());
      return describe(address.sin_addr, text.data());
    }
    if (entry->ifa_addr->sa_family == AF_INET6 && !found) {
      sockaddr_in6 address{};
      std::memcpy(&address, entry->ifa_addr, sizeof address);
      if (!IN6_IS_ADDR_LINKLOCAL(&address.sin6_addr)) {
        ::inet_ntop(AF_INET6, &address.sin6_addr, text.data(), text.size());
        found = describe(address.sin6_addr, text.data());
      }
    }
  }
  return found;
}

// Longest name of the name service.
constexpr std::size_t kLongestName = 253;

// Why peers cannot be told to connect to this host, or nothing. IPv6 may have brackets.
std::string host_error(std::string host) {
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  if (const auto address = parse_ip(host)) {
    return address->wildcard ? "is every address of a host, not one to connect to" : "";
  }
  const bool name =
      !host.empty() && host.size() <= kLongestName && std::ranges::all_of(host, [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
               c == '.' || c == '-' || c == '_';
      });
  if (!name) {
    return "is neither an IP address nor a host name (no port, no tcp://)";
  }
  addrinfo* raw = nullptr;
  const int status = ::getaddrinfo(host.c_str(), nullptr, nullptr, &raw);
  if (status != 0) {
    return fmt::format("cannot be resolved on this host ({})", ::gai_strerror(status));
  }
  ::freeaddrinfo(raw);
  return "";
}

// "torch-distro-<pid namespace>-<pid>-<start>-": a directory is only judged by those who see the
// same processes.
std::string directory_prefix() {
  struct stat space {};
  const bool known = ::stat("/proc/self/ns/pid", &space) == 0;
  return fmt::format("torch-distro-{}-", known ? static_cast<std::uint64_t>(space.st_ino) : 0);
}

// Remove what processes that were killed have left. Best effort: a directory of another user, or
// one that another rank removes just now, is passed over.
void remove_stale_directories(const std::filesystem::path& parent, const std::string& prefix) {
  std::error_code ignored;
  std::filesystem::directory_iterator entry(parent, ignored);
  for (; entry != std::filesystem::directory_iterator(); entry.increment(ignored)) {
    const std::string name = entry->path().filename().string();
    ProcessId owner;
    if (name.starts_with(prefix) &&
        std::sscanf(name.c_str() + prefix.size(), "%" SCNd64 "-%" SCNu64 "-", &owner.pid,
                    &owner.start) == 2 &&
        !is_alive(owner)) {
      std::filesystem::remove_all(entry->path(), ignored);
    }
  }
}

}  // namespace

std::optional<Endpoint> split_endpoint(const std::string& text, bool any_port) {
  constexpr std::string_view kScheme = "tcp://";
  const std::size_t colon = text.rfind(':');
  if (!text.starts_with(kScheme) || colon == std::string::npos || colon <= kScheme.size()) {
    return std::nullopt;
  }
  Endpoint parts{text.substr(kScheme.size(), colon - kScheme.size()), 0};
  if (parts.host.size() > 2 && parts.host.front() == '[' && parts.host.back() == ']') {
    parts.host = parts.host.substr(1, parts.host.size() - 2);
  }
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data() + colon + 1, end, parts.port);
  if (parsed.ec != std::errc{} || parsed.ptr != end || (parts.port == 0 && !any_port)) {
    return std::nullopt;
  }
  return parts;
}

bool is_every_address(const std::string& text) {
  const auto address = parse_ip(text);
  return address && address->wildcard;
}

void check_advertised(const ChannelConfig& config) {
  if (config.carrier != Carrier::tcp || config.advertise.empty()) {
    return;
  }
  if (const std::string error = host_error(config.advertise); !error.empty()) {
    throw ConfigError(fmt::format(
        "rank {}: peers cannot be told to connect to '{}', which {}: set DISTRO_ADVERTISE to the "
        "address or name under which the other hosts reach this one",
        config.rank, config.advertise, error));
  }
}

void check_endpoint(const ChannelConfig& config, int peer, const std::string& endpoint) {
  const auto refuse = [&](std::string_view why) {
    throw PeerError(peer, fmt::format("rank {}: rank {} cannot be reached at '{}': it {}. Set "
                                      "DISTRO_ADVERTISE (or DISTRO_BIND) on rank {}",
                                      config.rank, peer, endpoint, why, peer));
  };
  const std::string scheme = config.carrier == Carrier::tcp   ? "tcp://"
                             : config.carrier == Carrier::ipc ? "ipc://"
                                                              : "inproc://";
  if (!endpoint.starts_with(scheme) || endpoint.size() == scheme.size()) {
    refuse("is no " + scheme + " endpoint");
  }
  if (config.carrier != Carrier::tcp) {
    return;
  }
  const std::size_t colon = endpoint.rfind(':');
  std::uint16_t port = 0;
  const char* end = endpoint.data() + endpoint.size();
  const auto parsed = std::from_chars(endpoint.data() + colon + 1, end, port);
  if (colon < scheme.size() || parsed.ec != std::errc{} || parsed.ptr != end || port == 0) {
    refuse("has no port");
  }
  if (const auto error = host_error(endpoint.substr(scheme.size(), colon - scheme.size()));
      !error.empty()) {
    refuse(error);
  }
}

void check_relay(const ChannelConfig& config) {
  const auto refuse = [&](std::string_view why) {
    throw ConfigError(fmt::format("rank {}: the relay '{}' {}. DISTRO_RELAY is tcp://host:port",
                                  config.rank, config.relay, why));
  };
  const auto parts = split_endpoint(config.relay);
  if (!parts) {
    refuse("is no endpoint");
  }
  if (const auto error = host_error(parts->host); !error.empty()) {
    refuse(error);
  }
  if (config.keys && config.keys->relay_public_key.empty()) {
    throw ConfigError(
        fmt::format("rank {}: the peers file has no line for the relay: add `relay <its public "
                    "key>`, in the file of every rank",
                    config.rank));
  }
  const auto address = parse_ip(parts->host);
  const bool loopback = parts->host == "localhost" || (address && address->loopback);
  if (!loopback && !config.keys && !config.insecure) {
    throw ConfigError(
        fmt::format("rank {}: refused to use the relay {}: without keys, whoever is on the way can "
                    "read the training and inject gradients. Give the ranks and the relay keys "
                    "(`torch-distro keygen`), or set DISTRO_INSECURE=1 if the network is trusted "
                    "(a private network or a tunnel)",
                    config.rank, config.relay));
  }
}

std::string name_of(const ChannelConfig& config) {
  return config.rank < 0 ? "the relay" : fmt::format("rank {}", config.rank);
}

namespace {

Address address_to_bind(const ChannelConfig& config) {
  const std::string& wanted = config.bind_address;
  auto address = parse_ip(wanted);
  if (!address) {
    address = wanted == "localhost" ? parse_ip("127.0.0.1") : find_interface(wanted);
  }
  if (!address) {
    throw ConfigError(
        fmt::format("{}: cannot bind to '{}': it is neither an IP address nor an interface of this "
                    "host that has one; choose one of those (DISTRO_BIND; `ip addr` lists them)",
                    name_of(config), wanted));
  }
  return *address;
}

}  // namespace

bool is_open(const ChannelConfig& config) { return !address_to_bind(config).loopback; }

TcpPlan plan_tcp(const ChannelConfig& config) {
  const std::string& wanted = config.bind_address;
  const Address address = address_to_bind(config);
  if (!address.loopback && !config.keys && !config.insecure) {
    throw ConfigError(
        fmt::format("rank {}: refused to bind to {}: without keys, whoever reaches that address "
                    "can read the training and inject "
                    "gradients. Give the ranks keys (`torch-distro keygen`, "
                    "DISTRO_CURVE_SECRET_FILE and DISTRO_CURVE_PEERS_FILE), set DISTRO_INSECURE=1 "
                    "if the network is trusted (a private network or a tunnel), or "
                    "DISTRO_BIND=127.0.0.1 if all ranks are on this host",
                    config.rank, wanted));
  }
  if (address.wildcard && config.advertise.empty()) {
    throw ConfigError(fmt::format(
        "rank {}: DISTRO_BIND={} is every address of this host, and which of them leads to the "
        "peers is not known: set DISTRO_ADVERTISE",
        config.rank, wanted));
  }
  if (config.last_port < config.first_port || (config.first_port == 0) != (config.last_port == 0)) {
    throw ConfigError(fmt::format(
        "rank {}: the port range {}-{} is empty: DISTRO_PORTS is first-last, both above 0",
        config.rank, config.first_port, config.last_port));
  }
  TcpPlan plan{
      address.text, config.advertise.empty() ? address.text : config.advertise, address.ipv6, {}};
  for (std::uint32_t port = config.first_port; port <= config.last_port; ++port) {
    plan.ports.push_back(static_cast<std::uint16_t>(port));
  }
  return plan;
}

std::string endpoint_to_dial(const std::string& given, const std::string& published) {
  constexpr std::size_t kScheme = sizeof("tcp://") - 1;
  if (given.empty()) {
    return published;
  }
  const auto bracket = given.find(']');
  const auto colon = given.find(':', bracket == std::string::npos ? kScheme : bracket);
  return colon == std::string::npos
             ? given + published.substr(std::min(published.rfind(':'), published.size()))
             : given;
}

std::string tcp_endpoint(std::string_view host, std::uint16_t port) {
  const bool bare_ipv6 = host.find(':') != std::string_view::npos && host.front() != '[';
  const std::string shown = bare_ipv6 ? fmt::format("[{}]", host) : std::string(host);
  return port == 0 ? fmt::format("tcp://{}:*", shown) : fmt::format("tcp://{}:{}", shown, port);
}

SocketDirectory::SocketDirectory() {
  const char* runtime = ::secure_getenv("XDG_RUNTIME_DIR");
  std::error_code ignored;
  const bool usable =
      runtime != nullptr && *runtime == '/' && std::filesystem::is_directory(runtime, ignored);
  const std::string parent = usable ? runtime : "/tmp";
  const std::string prefix = directory_prefix();
  remove_stale_directories(parent, prefix);
  const ProcessId owner = this_process();
  std::string name = fmt::format("{}/{}{}-{}-XXXXXX", parent, prefix, owner.pid, owner.start);
  if (::mkdtemp(name.data()) == nullptr) {  // mode 0700
    throw ConfigError(fmt::format(
        "cannot make the directory {} for the ranks' Unix sockets ({}): point XDG_RUNTIME_DIR "
        "to a directory that can be written",
        name, std::strerror(errno)));
  }
  path_ = name;
  constexpr std::size_t kLongestPath = sizeof(sockaddr_un::sun_path) - 1;
  constexpr std::size_t kLongestFile = sizeof("/2147483647") - 1;
  if (name.size() + kLongestFile > kLongestPath) {
    std::filesystem::remove(path_, ignored);
    throw ConfigError(fmt::format(
        "{} is too long for a Unix socket (at most {} bytes): point XDG_RUNTIME_DIR to a "
        "shorter path",
        name, kLongestPath - kLongestFile));
  }
}

SocketDirectory::~SocketDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string SocketDirectory::endpoint(int rank) const {
  return fmt::format("ipc://{}/{}", path_.string(), rank);
}

}  // namespace distro::transport
