// Faults drawn by a seed, one after the other, while ranks exchange messages: connections that
// break or stand still, half-open ones, a relay that is killed, strangers. With keys, as on the
// internet. integration/fault_campaign.py does the same to trainings.

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/transport/group.h"
#include "tests/transport/key_ring.h"
#include "tests/transport/proxy.h"
#include "tests/transport/raw_peer.h"
#include "tests/transport/relay_thread.h"
#include "transport/channel.h"

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

constexpr int kRanks = 3;
// Fewer: kinds of faults and their overlaps are left out; more: the test takes longer, a third of a
// second each.
constexpr int kFaults = 24;
// More than a chunk, so that faults fall between the chunks of a message, and less than makes
// sanitized builds slow.
constexpr std::size_t kMostBytes = 300'000;

std::uint64_t seed_of(int rank, int number) {
  return static_cast<std::uint64_t>(1000 * number + rank);
}

// Messages of one rank to the others: the first byte says whether more follow.
Bytes message_of(std::size_t bytes, int rank, int number, bool last) {
  Bytes message = pattern(bytes, seed_of(rank, number));
  message[0] = std::byte{last};
  return message;
}

std::size_t bytes_of(std::uint64_t seed, int rank, int number) {
  std::mt19937_64 random(seed ^ seed_of(rank, number));
  return std::uniform_int_distribution<std::size_t>(1, kMostBytes)(random);
}

// Until rank 0 has seen that `over` is set, all ranks send to all and take what all have sent.
void exchange(Channel& channel, int rank, std::uint64_t seed, const std::atomic<bool>& over) {
  std::vector<int> peers;
  for (int peer = 0; peer < kRanks; ++peer) {
    if (peer != rank) {
      peers.push_back(peer);
    }
  }
  bool last = false;
  for (int number = 0; !last; ++number) {
    last = rank == 0 && over;
    const std::size_t own_bytes = bytes_of(seed, rank, number);
    channel.multicast(peers,
                      std::make_shared<const Bytes>(message_of(own_bytes, rank, number, last)));
    for (const int peer : peers) {
      const Bytes message = channel.receive(peer, in(seconds(60)));
      if (peer == 0) {
        last = message[0] == std::byte{1};
      }
      ASSERT_TRUE(message ==
                  message_of(bytes_of(seed, peer, number), peer, number, peer == 0 && last))
          << "rank " << rank << ", message " << number << " of rank " << peer;
    }
  }
}

class Campaign {
 public:
  explicit Campaign(std::uint64_t seed) : seed_(seed), random_(seed), ring_(kRanks) {}

  void mesh() {
    std::vector<PeerAddress> own;
    for (int rank = 0; rank < kRanks; ++rank) {
      ChannelConfig options = config(Carrier::tcp, rank, kRanks);
      options.keys = ring_.of(rank);
      channels_.push_back(open_channel(options));
      own.push_back(channels_.back()->address());
    }
    strangers_target_ = own[0];
    // Each pair has a line of its own: the higher rank dials.
    for (int rank = 0; rank < kRanks; ++rank) {
      auto seen = own;
      for (int peer = 0; peer < rank; ++peer) {
        auto& address = seen[static_cast<std::size_t>(peer)];
        lines_.push_back(std::make_unique<Proxy>(address.endpoint));
        address.endpoint = lines_.back()->endpoint();
      }
      channels_[static_cast<std::size_t>(rank)]->connect(seen);
    }
    run();
  }

  void hub() {
    const KeyPair pair = make_key_pair();
    RelayConfig relay_config;
    Keys of_relay = ring_.of(0);
    of_relay.own = pair;
    of_relay.relay_public_key = pair.public_key;
    relay_config.runs = {of_relay};
    relay_ = std::make_unique<RelayThread>(relay_config);
    strangers_target_.endpoint = relay_->endpoint();
    std::vector<PeerAddress> addresses;
    for (int rank = 0; rank < kRanks; ++rank) {
      lines_.push_back(std::make_unique<Proxy>(relay_->endpoint()));
      ChannelConfig options = config(Carrier::tcp, rank, kRanks);
      options.keys = ring_.of(rank);
      options.keys->relay_public_key = pair.public_key;
      options.relay = lines_.back()->endpoint();
      channels_.push_back(open_channel(options));
      addresses.push_back(channels_.back()->address());
    }
    for (const auto& channel : channels_) {
      channel->connect(addresses);
    }
    run();
  }

 private:
  void run() {
    std::atomic<bool> over{false};
    std::vector<std::thread> ranks;
    for (int rank = 0; rank < kRanks; ++rank) {
      ranks.emplace_back([this, rank, &over] {
        Channel& channel = *channels_[static_cast<std::size_t>(rank)];
        EXPECT_NO_THROW(exchange(channel, rank, seed_, over)) << "rank " << rank;
        channel.close(in(seconds(20)));
      });
    }
    for (int fault = 0; fault < kFaults; ++fault) {
      pause(200);
      inject();
    }
    over = true;
    for (auto& rank : ranks) {
      rank.join();
    }
    std::uint64_t reconnects = 0;
    for (const auto& channel : channels_) {
      EXPECT_FALSE(channel->lost()) << channel->lost()->what();
      reconnects += channel->counters().reconnects;
    }
    EXPECT_GT(reconnects, 0U);
  }

  void inject() {
    Proxy& line = *lines_[below(lines_.size())];
    switch (below(relay_ ? 6 : 5)) {
      case 0:
        line.cut();
        break;
      case 1:  // all at once
        for (const auto& each : lines_) {
          each->cut();
        }
        break;
      case 2:
        line.hold(true);
        pause(400);
        line.hold(false);
        break;
      case 3:  // it breaks while nothing passes
        line.hold(true);
        pause(200);
        line.cut();
        line.hold(false);
        break;
      case 4: {
        RawPeer stranger(strangers_target_);
        stranger.send(pattern(1 + below(2'000), below(1'000)));
        pause(50);
        break;
      }
      default:
        relay_->stop();
        pause(200);
        relay_->start();
        break;
    }
  }

  std::size_t below(std::size_t limit) {
    return std::uniform_int_distribution<std::size_t>(0, limit - 1)(random_);
  }

  void pause(int most_ms) {
    std::this_thread::sleep_for(
        milliseconds(std::uniform_int_distribution<int>(0, most_ms)(random_)));
  }

  const std::uint64_t seed_;
  std::mt19937_64 random_;
  const KeyRing ring_;
  PeerAddress strangers_target_;
  std::unique_ptr<RelayThread> relay_;
  std::vector<std::unique_ptr<Proxy>> lines_;
  std::vector<std::unique_ptr<Channel>> channels_;
};

TEST(Campaign, NothingIsLostOrDoubledInAMesh) { Campaign(test_seed()).mesh(); }

TEST(Campaign, NothingIsLostOrDoubledByARelay) { Campaign(test_seed()).hub(); }

}  // namespace
}  // namespace distro::transport::test
