#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/transport/group.h"
#include "tests/transport/raw_peer.h"
#include "transport/channel.h"

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

// A valid frame with a byte flipped, cut, extended, or with a lie about its length. Never the
// original.
Bytes mutated(Bytes frame, std::mt19937_64& random) {
  switch (random() % 4) {
    case 0:
      frame[random() % frame.size()] ^= static_cast<std::byte>(1 + random() % 255);
      break;
    case 1:
      frame.resize(random() % frame.size());
      break;
    case 2:
      frame.resize(frame.size() + 1 + random() % 100);
      break;
    default: {
      const auto lie = static_cast<std::uint32_t>(random());
      std::memcpy(frame.data() + 4, &lie, sizeof lie);
    }
  }
  return frame;
}

TEST(Hostile, MutatedFramesOfAStrangerAreCountedAndHarmless) {
  std::mt19937_64 random(test_seed());
  Group group(Carrier::tcp, 2);
  expect_works(group, 1);
  RawPeer stranger(group[0].address());
  const Bytes hello = stranger.hello(config(Carrier::tcp, 1, 2), group.addresses[1]);
  const Bytes data =
      encode({FrameKind::data, 3, group.addresses[1].session, 0, 0}, pattern(200, 1));
  constexpr std::uint64_t kFrames = 200;
  for (std::uint64_t i = 0; i < kFrames; ++i) {
    stranger.send(mutated(i % 2 == 0 ? hello : data, random));
  }
  EXPECT_TRUE(becomes([&] { return group[0].counters().rejected_frames == kFrames; }))
      << group[0].counters().rejected_frames;
  expect_works(group, 3);
  EXPECT_EQ(group[0].counters().reconnects, 0U);
  group.close_all();
}

TEST(Hostile, GreetingsOfStrangersAreRejected) {
  Group group(Carrier::tcp, 3);
  expect_works(group, 1);
  RawPeer stranger(group[0].address());
  const auto greet = [&](const std::function<void(ChannelConfig&, PeerAddress&)>& lie) {
    ChannelConfig own = config(Carrier::tcp, 1, 3);
    PeerAddress address = group.addresses[1];
    lie(own, address);
    const auto before = group[0].counters().rejected_frames;
    stranger.send(stranger.hello(own, address));
    return becomes([&] { return group[0].counters().rejected_frames > before; });
  };
  EXPECT_TRUE(greet([](ChannelConfig& own, PeerAddress&) { own.group += 1; }));
  EXPECT_TRUE(greet([](ChannelConfig&, PeerAddress& address) { address.session += 1; }));
  EXPECT_TRUE(
      greet([](ChannelConfig& own, PeerAddress&) { own.rank = 2; }));  // with rank 1's session
  EXPECT_TRUE(greet([](ChannelConfig& own, PeerAddress&) { own.rank = 0; }));
  EXPECT_TRUE(greet([](ChannelConfig& own, PeerAddress&) { own.rank = -1; }));
  EXPECT_TRUE(greet([](ChannelConfig& own, PeerAddress&) { own.world_size = 4; }));
  EXPECT_TRUE(greet([](ChannelConfig& own, PeerAddress&) { own.chunk_bytes *= 2; }));
  const auto before = group[0].counters().rejected_frames;
  stranger.send({FrameKind::data, 3, group.addresses[1].session, 0, 0},
                pattern(10, 1));  // without a HELLO
  stranger.send({FrameKind::abort, 0, group.addresses[1].session, 0, 0}, pattern(10, 1));
  stranger.send_parts(3);
  stranger.send(Bytes(40'000));
  EXPECT_TRUE(becomes([&] { return group[0].counters().rejected_frames == before + 4; }));
  expect_works(group, 3);
  EXPECT_FALSE(group[0].lost());
  group.close_all();
}

TEST(Hostile, AFrameAboveTheLimitEndsItsConnectionOnly) {
  Group group(Carrier::tcp, 2);
  RawPeer stranger(group[0].address());
  stranger.send(Bytes(1 << 20));
  expect_works(group, 1);
  EXPECT_EQ(group[0].counters().reconnects, 0U);
  group.close_all();
}

// The limit is 4 connections a rank and 64 more.
TEST(Hostile, ConnectionsOfStrangersAreLimited) {
  Group group(Carrier::tcp, 2);
  expect_works(group, 1);
  const std::string endpoint = group[0].address().endpoint;
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port =
      htons(static_cast<std::uint16_t>(std::stoi(endpoint.substr(endpoint.rfind(':') + 1))));
  constexpr std::size_t kStrangers = 200;
  std::vector<pollfd> strangers;
  for (std::size_t i = 0; i < kStrangers; ++i) {
    const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
    ASSERT_EQ(::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    strangers.push_back({fd, POLLRDHUP, 0});
  }
  const auto ended = [&] {
    ::poll(strangers.data(), strangers.size(), 0);
    return std::count_if(strangers.begin(), strangers.end(), [](const pollfd& stranger) {
      return (stranger.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
    });
  };
  EXPECT_TRUE(becomes([&] { return ended() >= static_cast<std::ptrdiff_t>(kStrangers - 72); }))
      << ended();
  EXPECT_LE(ended(), static_cast<std::ptrdiff_t>(kStrangers - 60));
  expect_works(group, 3);
  EXPECT_EQ(group[0].counters().reconnects, 0U);
  for (const pollfd& stranger : strangers) {
    ::close(stranger.fd);
  }
  group.close_all();
}

// A rank that knows all numbers of its session and still breaks the rules.
class Traitor : public testing::Test {
 protected:
  Traitor() {
    own.session = 77;
    own.protocol = kProtocolVersion;
    own.host = "elsewhere";
    channel->connect({channel->address(), own});
    peer.send(peer.hello(config(Carrier::tcp, 1, 2), own));
    const auto welcome = peer.receive(FrameKind::welcome);
    EXPECT_TRUE(welcome && parse_greeting(welcome->payload).addressee == own.session);
  }

  std::unique_ptr<Channel> channel = open_channel(config(Carrier::tcp, 0, 2));
  PeerAddress own;
  RawPeer peer{channel->address()};
};

TEST_F(Traitor, HonestFramesAreTaken) {
  peer.send({FrameKind::data, kFlagFirst, 77, 0, 0}, pattern(100, 1));
  peer.send({FrameKind::data, kFlagLast, 77, 1, 0}, {});
  EXPECT_EQ(channel->receive(1, in(seconds(5))), pattern(100, 1));
  const auto ack = peer.receive(FrameKind::ack);
  ASSERT_TRUE(ack);
  EXPECT_EQ(ack->header.ack, 2U);
  EXPECT_EQ(ack->header.session, channel->address().session);
}

TEST_F(Traitor, ImpossibleNumbersAreRejectedAndTheSessionGoesOn) {
  const auto before = channel->counters().rejected_frames;
  peer.send({FrameKind::data, 3, 77, 1'000'000, 0}, pattern(10, 1));  // far ahead
  peer.send({FrameKind::ack, 0, 77, 0, 5});                           // of what was never sent
  peer.send({FrameKind::data, 3, 78, 0, 0}, pattern(10, 1));          // another session
  EXPECT_TRUE(becomes([&] { return channel->counters().rejected_frames == before + 3; }));
  peer.send({FrameKind::data, 3, 77, 0, 0}, pattern(10, 2));
  peer.send({FrameKind::data, 3, 77, 0, 0}, pattern(10, 3));  // the number again: a duplicate
  EXPECT_EQ(channel->receive(1, in(seconds(5))), pattern(10, 2));
  EXPECT_TRUE(becomes([&] { return channel->counters().duplicate_frames == 1; }));
}

TEST_F(Traitor, AMessageOutOfOrderEndsTheSessionAndNamesTheRank) {
  peer.send({FrameKind::data, kFlagLast, 77, 0, 0}, pattern(10, 1));
  EXPECT_TRUE(loses(*channel, 1, 1, "rank 1 broke the session protocol"));
}

TEST_F(Traitor, AnAbortCannotBlameAStranger) {
  const std::string payload = encode_abort(9, "x");
  const auto bytes = std::as_bytes(std::span(payload));
  const auto before = channel->counters().rejected_frames;
  peer.send({FrameKind::abort, 0, 77, 0, 0}, Bytes(bytes.begin(), bytes.end()));
  EXPECT_TRUE(becomes([&] { return channel->counters().rejected_frames == before + 1; }));
  EXPECT_FALSE(channel->lost());
}

}  // namespace
}  // namespace distro::transport::test
