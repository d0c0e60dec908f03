#include <gtest/gtest.h>

#include <thread>
#include <zmq.hpp>

#include "tests/transport/group.h"
#include "tests/transport/proxy.h"
#include "transport/channel.h"
#include "transport/frame.h"

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

// Two ranks; rank 1 dials rank 0 through a proxy.
struct ProxiedPair {
  explicit ProxiedPair(const Group::Tune& tune = {}) {
    for (int rank = 0; rank < 2; ++rank) {
      ChannelConfig options = config(Carrier::tcp, rank, 2);
      if (tune) {
        tune(options);
      }
      channels.push_back(open_channel(options));
    }
    proxy = std::make_unique<Proxy>(channels[0]->address().endpoint);
    PeerAddress through_proxy = channels[0]->address();
    through_proxy.endpoint = proxy->endpoint();
    channels[0]->connect({channels[0]->address(), channels[1]->address()});
    channels[1]->connect({through_proxy, channels[1]->address()});
  }
  Channel& operator[](std::size_t rank) { return *channels[rank]; }

  std::vector<std::unique_ptr<Channel>> channels;
  std::unique_ptr<Proxy> proxy;
};

TEST(Reconnect, NothingIsLostOrDoubledWhenConnectionsBreak) {
  ProxiedPair pair([](ChannelConfig& options) {
    options.window_bytes = 1 << 20;
    options.inbox_bytes = 2 << 20;  // so that most is still to come when a connection breaks
  });
  constexpr std::uint64_t kMessages = 40;
  constexpr std::size_t kSize = 1 << 20;
  const auto exchange = [&](std::size_t self) {
    const int peer = static_cast<int>(1 - self);
    for (std::uint64_t number = 0; number < kMessages; ++number) {
      pair[self].send(peer, shared_pattern(kSize, 2 * number + self));
    }
    for (std::uint64_t number = 0; number < kMessages; ++number) {
      ASSERT_TRUE(pair[self].receive(peer, in(seconds(20))) ==
                  pattern(kSize, 2 * number + 1 - self))
          << "message " << number;
      if (self == 0 && number % 10 == 3) {
        pair.proxy->cut();
      }
    }
  };
  std::thread other([&] { exchange(1); });
  exchange(0);
  other.join();
  EXPECT_GE(pair[0].counters().reconnects, 1U);
  EXPECT_GE(pair[1].counters().reconnects, 1U);
  EXPECT_EQ(pair[0].counters().rejected_frames, 0U);
  EXPECT_FALSE(pair[0].lost() || pair[1].lost());
  std::thread closer([&] { pair[1].close(in(seconds(5))); });
  pair[0].close(in(seconds(5)));
  closer.join();
}

// The acceptor learns of a broken connection only by probing, the dialer by its monitor.
TEST(Reconnect, BothSidesLoseAPeerThatStaysAwayForTheTimeout) {
  ProxiedPair pair([](ChannelConfig& options) { options.timeout = milliseconds(500); });
  pair[0].send(1, shared_pattern(10, 1));
  pair[1].send(0, shared_pattern(10, 1));
  pair[0].receive(1, in(seconds(5)));
  pair[1].receive(0, in(seconds(5)));
  const auto began = Clock::now();
  EXPECT_EQ(pair[1].trouble(0), "");
  pair.proxy->cut_for_good();
  EXPECT_TRUE(
      becomes([&] { return pair[1].trouble(0).starts_with("the connection to rank 0 broke"); }));
  EXPECT_TRUE(loses(pair[0], 1, 1, "stayed disconnected"));
  EXPECT_TRUE(loses(pair[1], 0, 0, "stayed disconnected"));
  EXPECT_NE(pair[1].trouble(0).find("stayed disconnected"), std::string::npos);
  EXPECT_GE(Clock::now() - began, milliseconds(490));
  EXPECT_LT(Clock::now() - began, seconds(3));
}

TEST(Reconnect, AReceiverThatWaitsLongerThanTheBreakNoticesNothing) {
  ProxiedPair pair;
  pair[1].send(0, shared_pattern(10, 1));
  pair[0].receive(1, in(seconds(5)));
  pair.proxy->cut();
  pair[0].send(1, shared_pattern(10, 2));
  EXPECT_EQ(pair[1].receive(0, in(seconds(10))), pattern(10, 2));
}

// ZeroMQ gives a DEALER up for good when a frame is above MAXMSGSIZE; the rank dials anew.
TEST(Reconnect, ADealerThatZeroMqGaveUpIsMadeAnew) {
  zmq::context_t context;
  zmq::socket_t router(context, zmq::socket_type::router);
  router.set(zmq::sockopt::linger, 0);
  router.set(zmq::sockopt::rcvtimeo, 5000);
  router.bind("tcp://127.0.0.1:*");
  const auto channel = open_channel(config(Carrier::tcp, 1, 2));
  PeerAddress fake = channel->address();
  fake.endpoint = router.get(zmq::sockopt::last_endpoint);
  fake.host = "elsewhere";
  channel->connect({fake, channel->address()});
  for (int round = 0; round < 2; ++round) {
    zmq::message_t id;
    zmq::message_t body;
    do {
      ASSERT_TRUE(router.recv(id, zmq::recv_flags::none)) << "no HELLO in round " << round;
      ASSERT_TRUE(router.recv(body, zmq::recv_flags::none));
      const auto parsed = parse_frame({body.data<std::byte>(), body.size()}, 1000);
      ASSERT_TRUE(parsed.frame);
      EXPECT_EQ(parsed.frame->header.kind, FrameKind::hello);
    } while (body.size() == 0);
    router.send(id, zmq::send_flags::sndmore);
    router.send(zmq::message_t(1 << 20), zmq::send_flags::none);
  }
}

}  // namespace
}  // namespace distro::transport::test
