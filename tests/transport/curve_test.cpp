// Channels with keys, and what strangers can do to them.

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>
#include <zmq.hpp>

#include "tests/transport/group.h"
#include "tests/transport/key_ring.h"
#include "tests/transport/proxy.h"
#include "tests/transport/raw_peer.h"
#include "transport/bind.h"
#include "transport/channel.h"
#include "transport/frame.h"
#include "transport/socket_options.h"

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

// How long what must not come is waited for.
constexpr milliseconds kMoment{200};

// A TCP connection to a channel's port, and no ZeroMQ behind it.
class RawSocket {
 public:
  explicit RawSocket(const std::string& endpoint) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port =
        htons(static_cast<std::uint16_t>(std::stoi(endpoint.substr(endpoint.rfind(':') + 1))));
    if (::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      throw std::runtime_error("raw socket: cannot connect");
    }
  }
  ~RawSocket() { ::close(fd_); }
  RawSocket(RawSocket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  RawSocket& operator=(RawSocket&&) = delete;

  void send(const std::string& bytes) const {
    ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  // Whether the other end hangs up; what it says before is dropped.
  [[nodiscard]] bool is_ended() const {
    std::array<char, 4096> buffer{};
    for (const auto deadline = in(seconds(5)); Clock::now() < deadline;) {
      pollfd waiting{fd_, POLLIN, 0};
      if (::poll(&waiting, 1, 100) > 0 && ::recv(fd_, buffer.data(), buffer.size(), 0) <= 0) {
        return true;
      }
    }
    return false;
  }

 private:
  int fd_;
};

// The greeting of ZMTP 3.1 by a client of this mechanism.
std::string greeting(const std::string& mechanism) {
  std::string bytes("\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01", 12);
  bytes += mechanism + std::string(20 - mechanism.size(), '\0');
  return bytes + std::string(32, '\0');
}

std::function<void(zmq::socket_t&)> with_key(const KeyPair& own, const KeyPair& server) {
  return [&](zmq::socket_t& socket) { secure_client(socket, own, server.public_key); };
}

class Curve : public testing::Test {
 protected:
  static constexpr int kRanks = 3;

  Curve() { expect_works(group, 1); }
  ~Curve() override {
    expect_works(group, 3);
    EXPECT_FALSE(group[0].lost());
    EXPECT_EQ(group[0].counters().reconnects, 0U);
    group.close_all();
  }

  // Rank 0 counts a connection that it has refused, and nothing has come over it.
  void expect_refused(const std::function<void()>& act) {
    const ChannelCounters before = group[0].counters();
    act();
    EXPECT_TRUE(becomes(
        [&] { return group[0].counters().rejected_connections > before.rejected_connections; }));
    EXPECT_EQ(group[0].counters().rejected_frames, before.rejected_frames);
  }
  // Rank 0 counts a frame that it has refused, and answers nothing.
  void expect_rejected(RawPeer& peer, const Bytes& frame) {
    const auto before = group[0].counters().rejected_frames;
    peer.send(frame);
    EXPECT_TRUE(becomes([&] { return group[0].counters().rejected_frames > before; }));
  }
  [[nodiscard]] std::string endpoint() const { return group.addresses[0].endpoint; }

  KeyRing ring{kRanks};
  Group group{Carrier::tcp, kRanks, ring.tune()};
};

TEST_F(Curve, AllRanksExchange) {
  group.each([&](int rank, Channel& channel) {
    for (int peer = 0; peer < kRanks; ++peer) {
      if (peer != rank) {
        channel.send(peer, shared_pattern(300'000, static_cast<std::uint64_t>(rank)));
      }
    }
    for (int peer = 0; peer < kRanks; ++peer) {
      if (peer != rank) {
        EXPECT_TRUE(channel.receive(peer, in(seconds(10))) ==
                    pattern(300'000, static_cast<std::uint64_t>(peer)));
      }
    }
  });
  for (int rank = 0; rank < kRanks; ++rank) {
    EXPECT_EQ(group[rank].counters().rejected_connections, 0U);
    EXPECT_EQ(group[rank].counters().rejected_frames, 0U);
  }
}

TEST_F(Curve, AStrangersKeyIsRefused) {
  const KeyPair stranger = make_key_pair();
  expect_refused([&] {
    RawPeer peer(group.addresses[0], with_key(stranger, ring.pairs[0]));
    peer.send(peer.hello(config(Carrier::tcp, 1, kRanks), group.addresses[1]));
    EXPECT_FALSE(peer.receive(FrameKind::welcome, kMoment));
  });
}

TEST_F(Curve, AClientWithoutKeysIsRefused) {
  expect_refused([&] {
    RawPeer peer(group.addresses[0]);
    peer.send(peer.hello(config(Carrier::tcp, 1, kRanks), group.addresses[1]));
    EXPECT_FALSE(peer.receive(FrameKind::welcome, kMoment));
  });
}

// Who knows a rank's key, but not that of the rank that it dials, gets nowhere either.
TEST_F(Curve, AGreetingForAnotherKeyIsRefused) {
  expect_refused([&] {
    RawPeer peer(group.addresses[0], with_key(ring.pairs[1], ring.pairs[2]));
    peer.send(peer.hello(config(Carrier::tcp, 1, kRanks), group.addresses[1]));
    EXPECT_FALSE(peer.receive(FrameKind::welcome, kMoment));
  });
}

TEST_F(Curve, OnlyHigherRanksMayDial) {
  const auto before = group[1].counters().rejected_connections;
  RawPeer peer(group.addresses[1], with_key(ring.pairs[0], ring.pairs[1]));
  EXPECT_TRUE(becomes([&] { return group[1].counters().rejected_connections > before; }));
}

TEST_F(Curve, AKnownKeyCannotSpeakForAnotherRank) {
  RawPeer peer(group.addresses[0], with_key(ring.pairs[2], ring.pairs[0]));
  expect_rejected(peer, peer.hello(config(Carrier::tcp, 1, kRanks), group.addresses[1]));
  expect_rejected(peer, peer.hello(config(Carrier::tcp, 0, kRanks), group.addresses[0]));
  EXPECT_FALSE(peer.receive(FrameKind::welcome, kMoment));
}

TEST_F(Curve, AGreetingOfAnEarlierLifeIsRefused) {
  RawPeer peer(group.addresses[0], with_key(ring.pairs[1], ring.pairs[0]));
  PeerAddress earlier = group.addresses[1];
  earlier.session ^= 1;  // the rank as it was before it was started anew
  expect_rejected(peer, peer.hello(config(Carrier::tcp, 1, kRanks), earlier));
  // One that was meant for an earlier life of rank 0.
  PeerAddress target = group.addresses[0];
  target.session ^= 1;
  RawPeer other(target, with_key(ring.pairs[1], ring.pairs[0]));
  expect_rejected(other, other.hello(config(Carrier::tcp, 1, kRanks), group.addresses[1]));
  EXPECT_FALSE(other.receive(FrameKind::welcome, kMoment));
}

TEST_F(Curve, AnOldVersionIsRefused) {
  RawPeer peer(group.addresses[0], with_key(ring.pairs[1], ring.pairs[0]));
  Bytes frame = peer.hello(config(Carrier::tcp, 1, kRanks), group.addresses[1]);
  frame[1] = std::byte{0};
  expect_rejected(peer, frame);
  Greeting greeting;
  greeting.min_version = greeting.max_version = 0;
  greeting.rank = 1;
  greeting.world_size = kRanks;
  greeting.group = config(Carrier::tcp, 1, kRanks).group;
  greeting.addressee = group.addresses[0].session;
  Bytes payload(kGreetingBytes);
  encode_greeting(greeting, std::span(payload).first<kGreetingBytes>());
  expect_rejected(peer, encode({FrameKind::hello, 0, group.addresses[1].session, 0, 0}, payload));
  EXPECT_FALSE(peer.receive(FrameKind::welcome, kMoment));
}

TEST_F(Curve, BytesThatAreNoGreetingAreRefused) {
  std::mt19937_64 random(test_seed());
  std::string garbage(2000, '\0');
  for (char& byte : garbage) {
    byte = static_cast<char>(random());
  }
  const std::vector<std::string> openings{
      "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
      garbage,
      std::string("\x01\x00", 2),                                 // ZMTP 1
      std::string("\xff\0\0\0\0\0\0\0\x01\x7f\x01\x05\0\0", 14),  // ZMTP 2, a DEALER
      greeting("NULL"),
      greeting("PLAIN"),
      greeting("curve"),
      // A command of 2 GB, and one of 2^63 bytes, in the place of CURVE's HELLO.
      greeting("CURVE") + std::string("\x06\0\0\0\0\x80\0\0\0", 9) + garbage,
      greeting("CURVE") + std::string("\x06\x80\0\0\0\0\0\0\0", 9) + garbage,
      // A message before the handshake.
      greeting("CURVE") + std::string("\x00\x05hello", 7),
      greeting("CURVE") + std::string("\x04\x20", 2) + garbage,
  };
  for (std::size_t i = 0; i < openings.size(); ++i) {
    SCOPED_TRACE(i);
    expect_refused([&] {
      const RawSocket socket(endpoint());
      socket.send(openings[i]);
      EXPECT_TRUE(socket.is_ended());
    });
  }
}

TEST_F(Curve, HalfAGreetingThatStallsHoldsNobodyUp) {
  std::vector<RawSocket> stalled;
  for (int i = 0; i < 20; ++i) {
    stalled.emplace_back(endpoint());
    stalled.back().send(greeting("CURVE").substr(0, static_cast<std::size_t>(3 * i)));
  }
  expect_works(group, 5);
}

// Channels of one process are told apart: a key of one opens no other.
TEST_F(Curve, AKeyOfAnotherGroupOfThisProcessIsRefused) {
  const KeyRing others(2);
  Group other(Carrier::tcp, 2, others.tune());
  expect_works(other, 7);
  expect_refused([&] {
    RawPeer peer(group.addresses[0], with_key(others.pairs[1], ring.pairs[0]));
    EXPECT_FALSE(peer.receive(FrameKind::welcome, kMoment));
  });
  other.close_all();
}

// Two ranks, of which rank 1 dials rank 0 through a proxy.
struct ProxiedPair {
  explicit ProxiedPair(const Group::Tune& tune) {
    for (int rank = 0; rank < 2; ++rank) {
      ChannelConfig options = config(Carrier::tcp, rank, 2);
      tune(options);
      channels.push_back(open_channel(options));
    }
    proxy = std::make_unique<Proxy>(channels[0]->address().endpoint);
  }
  void connect() {
    PeerAddress through_proxy = channels[0]->address();
    through_proxy.endpoint = proxy->endpoint();
    channels[0]->connect({channels[0]->address(), channels[1]->address()});
    channels[1]->connect({through_proxy, channels[1]->address()});
  }
  // A message of rank 1 that is easy to find.
  void exchange() {
    const std::string text = "the weights of rank 1";
    const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
    channels[1]->send(0, std::make_shared<const Bytes>(bytes, bytes + text.size()));
    EXPECT_EQ(channels[0]->receive(1, in(seconds(10))).size(), text.size());
  }

  std::vector<std::unique_ptr<Channel>> channels;
  std::unique_ptr<Proxy> proxy;
};

TEST(CurveWire, WhatCrossesItCannotBeRead) {
  const KeyRing ring(2);
  for (const bool keys : {false, true}) {
    ProxiedPair pair([&](ChannelConfig& options) {
      if (keys) {
        options.keys = ring.of(options.rank);
      }
    });
    pair.connect();
    pair.exchange();
    const std::string seen = pair.proxy->recorded();
    EXPECT_EQ(seen.find("the weights of rank 1") == std::string::npos, keys);
    EXPECT_EQ(seen.find(ring.pairs[1].secret.z85()), std::string::npos);
  }
}

TEST(CurveWire, ConnectionsThatBreakAreMadeAnew) {
  const KeyRing ring(2);
  ProxiedPair pair(ring.tune());
  pair.connect();
  for (int i = 0; i < 3; ++i) {
    pair.exchange();
    pair.proxy->cut();
  }
  pair.exchange();
  EXPECT_GE(pair.channels[0]->counters().reconnects, 1U);
}

TEST(CurveWire, AReplayedConnectionIsRefused) {
  const KeyRing ring(2);
  ProxiedPair pair(ring.tune());
  pair.connect();
  pair.exchange();
  const std::string recorded = pair.proxy->recorded();
  ASSERT_GT(recorded.size(), 500U);
  const auto before = pair.channels[0]->counters();
  const RawSocket replay(pair.channels[0]->address().endpoint);
  replay.send(recorded);
  EXPECT_TRUE(replay.is_ended());
  EXPECT_TRUE(becomes([&] {
    return pair.channels[0]->counters().rejected_connections == before.rejected_connections + 1;
  }));
  EXPECT_EQ(pair.channels[0]->counters().rejected_frames, before.rejected_frames);
  pair.exchange();
}

TEST(CurveWire, StrangersWhoSayNothingCannotKeepAPeerOut) {
  const KeyRing ring(2);
  ProxiedPair pair(ring.tune());
  pair.connect();
  pair.exchange();
  std::vector<RawSocket> strangers;
  for (int i = 0; i < 200; ++i) {  // the limit is 72
    strangers.emplace_back(pair.channels[0]->address().endpoint);
  }
  pair.proxy->cut();
  EXPECT_TRUE(becomes([&] { return pair.channels[0]->counters().reconnects == 1; }));
  pair.exchange();
  EXPECT_EQ(pair.channels[0]->counters().reconnects, 1U);
}

// While the others have not come, a rank is bound and not connected yet.
TEST(CurveWire, StrangersBeforeTheGroupHasMetAreCounted) {
  const KeyRing ring(2);
  ProxiedPair pair(ring.tune());
  constexpr std::uint64_t kStrangers = 3000;
  for (std::uint64_t i = 0; i < kStrangers; ++i) {
    const RawSocket stranger(pair.channels[0]->address().endpoint);
    stranger.send("x");
    if (i % 100 == 0) {
      EXPECT_TRUE(stranger.is_ended());
    }
  }
  EXPECT_TRUE(becomes([&] {
    return pair.channels[0]->counters().rejected_connections == kStrangers;
  })) << pair.channels[0]->counters().rejected_connections;
  pair.connect();
  pair.exchange();
}

// Somebody else at a rank's address.
class Impostor {
 public:
  explicit Impostor(const std::function<void(zmq::socket_t&)>& tune)
      : socket_(context_, zmq::socket_type::router) {
    socket_.set(zmq::sockopt::linger, 0);
    tune(socket_);
    socket_.bind("tcp://127.0.0.1:*");
  }
  [[nodiscard]] std::string endpoint() const { return socket_.get(zmq::sockopt::last_endpoint); }
  bool has_heard() {
    zmq::message_t message;
    return socket_.recv(message, zmq::recv_flags::dontwait).has_value();
  }

 private:
  zmq::context_t context_;
  zmq::socket_t socket_;
};

const auto kPlain = [](zmq::socket_t&) {};

TEST(CurveWire, AnImpostorIsNotSpokenToAndTheTimeoutSaysWhy) {
  const KeyRing ring(2);
  const KeyPair false_key = make_key_pair();
  for (const bool plain : {false, true}) {
    Impostor impostor([&](zmq::socket_t& socket) {
      if (!plain) {
        socket.set(zmq::sockopt::curve_server, true);
        socket.set(zmq::sockopt::curve_secretkey, std::string(false_key.secret.z85()));
      }
    });
    ChannelConfig options = config(Carrier::tcp, 1, 2);
    options.keys = ring.of(1);
    options.timeout = milliseconds(1000);
    const auto channel = open_channel(options);
    PeerAddress address = channel->address();
    address.host = "elsewhere";
    address.endpoint = impostor.endpoint();
    channel->connect({address, channel->address()});
    channel->send(0, shared_pattern(100, 1));
    EXPECT_TRUE(loses(*channel, 0, 0, "the handshake with " + impostor.endpoint() + " failed"));
    EXPECT_GE(channel->counters().rejected_connections, 1U);
    EXPECT_FALSE(impostor.has_heard());
  }
}

TEST(CurveWire, ARefusedRankTriesOnUntilItIsLetIn) {
  const KeyRing ring(2);
  for (const bool plain : {false, true}) {
    ProxiedPair pair(ring.tune());
    const KeyPair other = make_key_pair();
    Impostor impostor([&](zmq::socket_t& socket) {
      if (!plain) {
        socket.set(zmq::sockopt::curve_server, true);
        socket.set(zmq::sockopt::curve_secretkey, std::string(other.secret.z85()));
      }
    });
    pair.proxy->aim_at(impostor.endpoint());
    pair.connect();
    EXPECT_TRUE(becomes([&] { return pair.channels[1]->counters().rejected_connections > 0; }));
    pair.proxy->aim_at(pair.channels[0]->address().endpoint);
    pair.exchange();
  }
}

// The peers files of two ranks differ, which a rendezvous would have found out.
TEST(CurveWire, RanksThatDoNotKnowEachOtherTimeOutWithTheReason) {
  const KeyRing ring(2);
  const KeyRing other(2);
  Group group(Carrier::tcp, 2, [&](ChannelConfig& options) {
    options.keys = ring.of(options.rank);
    options.timeout = milliseconds(1000);
    if (options.rank == 1) {
      options.keys->own = other.pairs[1];
    }
  });
  group.each([&](int rank, Channel& channel) {
    try {
      channel.receive(1 - rank, in(seconds(20)));
      ADD_FAILURE() << "received something";
    } catch (const PeerLost& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find("peers files"), std::string::npos) << text;
      EXPECT_NE(text.find("timeout"), std::string::npos) << text;
    }
    EXPECT_GE(channel.counters().rejected_connections, 1U);
  });
  group.close_all();
}

TEST(CurveWire, OneSideWithoutKeysTimesOutWithTheReason) {
  const KeyRing ring(2);
  for (const int plain : {0, 1}) {
    Group group(Carrier::tcp, 2, [&](ChannelConfig& options) {
      options.timeout = milliseconds(1000);
      if (options.rank != plain) {
        options.keys = ring.of(options.rank);
      }
    });
    EXPECT_TRUE(loses(group[1], 0, 0, plain == 0 ? "has no keys" : "wants keys"));
    group.close_all();
  }
}

TEST(CurveWire, ThePeersFilesEndpointIsDialledNotTheStores) {
  const KeyRing ring(2);
  std::vector<std::unique_ptr<Channel>> channels;
  for (int rank = 0; rank < 2; ++rank) {
    ChannelConfig options = config(Carrier::tcp, rank, 2);
    options.keys = ring.of(rank);
    if (rank == 1) {
      options.keys->endpoint_by_rank = {channels[0]->address().endpoint, ""};
    }
    channels.push_back(open_channel(options));
  }
  PeerAddress told = channels[0]->address();
  told.endpoint = "tcp://192.0.2.1:9";
  channels[0]->connect({channels[0]->address(), channels[1]->address()});
  channels[1]->connect({told, channels[1]->address()});
  channels[1]->send(0, shared_pattern(10, 1));
  EXPECT_EQ(channels[0]->receive(1, in(seconds(5))), pattern(10, 1));
}

TEST(CurveWire, KeysAreChecked) {
  const KeyRing ring(2);
  const auto refuses = [&](const std::function<void(ChannelConfig&)>& tune) {
    ChannelConfig options = config(Carrier::tcp, 0, 2);
    options.keys = ring.of(0);
    tune(options);
    EXPECT_THROW(open_channel(options), ConfigError);
  };
  refuses([](ChannelConfig& options) { options.carrier = Carrier::ipc; });
  refuses([](ChannelConfig& options) { options.carrier = Carrier::inproc; });
  refuses([](ChannelConfig& options) { options.world_size = 3; });
  refuses([](ChannelConfig& options) { options.keys->public_by_rank[1] = "no key"; });
  refuses([](ChannelConfig& options) { options.keys->endpoint_by_rank = {"tcp://x"}; });
}

}  // namespace
}  // namespace distro::transport::test
