#include "transport/bind.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "tests/transport/group.h"
#include "tests/transport/key_ring.h"

namespace distro::transport::test {
namespace {

ChannelConfig bound_to(const std::string& address) {
  ChannelConfig options = config(Carrier::tcp, 0, 1);
  options.bind_address = address;
  return options;
}

std::string error_of(const ChannelConfig& options) {
  try {
    plan_tcp(options);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

TEST(Bind, LoopbackNeedsNothing) {
  for (const std::string address : {"127.0.0.1", "127.1.2.3", "::1", "localhost", "lo"}) {
    EXPECT_EQ(error_of(bound_to(address)), "") << address;
  }
  EXPECT_EQ(plan_tcp(bound_to("lo")).bind_host, "127.0.0.1");
}

TEST(Bind, BeyondLoopbackIsRefusedWithTheWayOut) {
  for (const std::string address : {"0.0.0.0", "::", "192.0.2.1", "2001:db8::1"}) {
    const std::string error = error_of(bound_to(address));
    EXPECT_NE(error.find("DISTRO_INSECURE=1"), std::string::npos) << error;
    EXPECT_NE(error.find("DISTRO_BIND=127.0.0.1"), std::string::npos) << error;
  }
  EXPECT_THROW(open_channel(bound_to("0.0.0.0")), ConfigError);
}

TEST(Bind, BeyondLoopbackIsAllowedWithKeys) {
  ChannelConfig options = bound_to("0.0.0.0");
  options.keys = KeyRing(1).of(0);
  options.advertise = "localhost";
  EXPECT_EQ(error_of(options), "");
  EXPECT_NO_THROW(open_channel(options));
}

TEST(Bind, WhatThePeersFileSaysOfAnEndpointWins) {
  const std::string published = "tcp://192.168.1.7:40001";
  EXPECT_EQ(endpoint_to_dial("", published), published);
  EXPECT_EQ(endpoint_to_dial("tcp://example.org", published), "tcp://example.org:40001");
  EXPECT_EQ(endpoint_to_dial("tcp://example.org:7", published), "tcp://example.org:7");
  EXPECT_EQ(endpoint_to_dial("tcp://[2001:db8::1]", published), "tcp://[2001:db8::1]:40001");
  EXPECT_EQ(endpoint_to_dial("tcp://[2001:db8::1]:7", published), "tcp://[2001:db8::1]:7");
  EXPECT_EQ(endpoint_to_dial("tcp://example.org", "rubbish"), "tcp://example.org");
}

TEST(Bind, WildcardNeedsAnAddressToTell) {
  ChannelConfig options = bound_to("0.0.0.0");
  options.insecure = true;
  EXPECT_NE(error_of(options).find("DISTRO_ADVERTISE"), std::string::npos);
  options.advertise = "localhost";
  EXPECT_EQ(error_of(options), "");
  const auto channel = open_channel(options);
  EXPECT_EQ(channel->address().endpoint.rfind("tcp://localhost:", 0), 0U)
      << channel->address().endpoint;
}

TEST(Bind, WhatPeersCannotConnectToIsRefusedAtTheStart) {
  for (const std::string advertise :
       {"no-such-host.invalid", "tcp://10.0.0.1", "10.0.0.1:4000", "a b", "::", "0.0.0.0", "x/y"}) {
    ChannelConfig options = bound_to("127.0.0.1");
    options.advertise = advertise;
    try {
      open_channel(options);
      ADD_FAILURE() << "opened with " << advertise;
    } catch (const ConfigError& error) {
      EXPECT_NE(std::string(error.what()).find(advertise), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("DISTRO_ADVERTISE"), std::string::npos);
    }
  }
  for (const std::string advertise : {"127.0.0.1", "::1", "[::1]", "localhost"}) {
    ChannelConfig options = bound_to("127.0.0.1");
    options.advertise = advertise;
    EXPECT_NO_THROW(open_channel(options)) << advertise;
  }
}

TEST(Bind, AnEndpointThatCannotBeDialledIsToldWithItsRank) {
  for (const std::string endpoint :
       {"", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:0", "tcp://127.0.0.1:70000",
        "tcp://no-such-host.invalid:4000", "ipc:///tmp/x", "tcp://;:4", "inproc://x"}) {
    const auto channel = open_channel(config(Carrier::tcp, 1, 2));
    PeerAddress peer = channel->address();
    peer.endpoint = endpoint;
    try {
      channel->connect({peer, channel->address()});
      ADD_FAILURE() << "dials " << endpoint;
    } catch (const PeerError& error) {
      EXPECT_EQ(error.rank(), 0);
      EXPECT_NE(std::string(error.what()).find("DISTRO_ADVERTISE"), std::string::npos);
    }
  }
}

TEST(Bind, UnknownInterfaceIsNamed) {
  EXPECT_NE(error_of(bound_to("nosuch0")).find("nosuch0"), std::string::npos);
}

TEST(Bind, EndpointsOfIpv6HaveBrackets) {
  EXPECT_EQ(tcp_endpoint("::1", 7), "tcp://[::1]:7");
  EXPECT_EQ(tcp_endpoint("10.0.0.1", 0), "tcp://10.0.0.1:*");
}

TEST(Bind, PortsAreTriedInOrderUntilAllAreInUse) {
  ChannelConfig options = bound_to("127.0.0.1");
  const auto first = open_channel(options);
  const std::string endpoint = first->address().endpoint;
  const auto port = static_cast<std::uint16_t>(std::stoi(endpoint.substr(endpoint.rfind(':') + 1)));
  options.first_port = options.last_port = port;
  try {
    open_channel(options);
    FAIL() << "bound a port in use";
  } catch (const ConfigError& error) {
    EXPECT_NE(std::string(error.what()).find("DISTRO_PORTS"), std::string::npos) << error.what();
  }
  options.last_port = static_cast<std::uint16_t>(port + 50);
  const auto second = open_channel(options);
  EXPECT_NE(second->address().endpoint, endpoint);
  options.last_port = static_cast<std::uint16_t>(port - 1);
  EXPECT_NE(error_of(options), "");
}

TEST(Bind, SocketDirectoryIsPrivateAndRemoved) {
  std::string path;
  {
    const SocketDirectory directory;
    const std::string endpoint = directory.endpoint(3);
    path = std::filesystem::path(endpoint.substr(6)).parent_path();
    struct stat info {};
    ASSERT_EQ(::stat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0700U);
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(Bind, SocketPathThatIsTooLongIsAnError) {
  const std::string long_directory =
      "/tmp/distro-test-" + std::to_string(::getpid()) + "-" + std::string(80, 'x');
  std::filesystem::create_directories(long_directory);
  const char* before = ::getenv("XDG_RUNTIME_DIR");
  const std::string saved = before == nullptr ? "" : before;
  ::setenv("XDG_RUNTIME_DIR", long_directory.c_str(), 1);
  EXPECT_THROW(SocketDirectory(), ConfigError);
  EXPECT_TRUE(std::filesystem::is_empty(long_directory));
  before == nullptr ? ::unsetenv("XDG_RUNTIME_DIR") : ::setenv("XDG_RUNTIME_DIR", saved.c_str(), 1);
  std::filesystem::remove_all(long_directory);
}

}  // namespace
}  // namespace distro::transport::test
