#include <gtest/gtest.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <map>
#include <vector>

#include "tests/transport/group.h"
#include "transport/plugin.h"

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

// The example transport, whose connection between two ranks breaks on demand: when rank 0 next
// sends data it vanishes, as do all frames after it, then DOWN and UP are told on both sides.
enum class Phase { whole, losing, broken, down };
constexpr std::size_t kDataFrame = 4096;  // bytes; acknowledgements and the like are smaller

std::shared_ptr<const Plugin> example;
std::array<std::atomic<Phase>, 2> phases{};
std::array<int, 2> alarms{-1, -1};               // eventfd by rank: there is DOWN or UP to tell
std::map<distro_transport_channel*, int> ranks;  // I/O thread
std::vector<int> descriptors;                    // for the test to close
int breaks = 0;                                  // I/O thread

int rank_of(distro_transport_channel* channel) { return ranks.at(channel); }
std::atomic<Phase>& phase_of(distro_transport_channel* channel) {
  return phases.at(static_cast<std::size_t>(rank_of(channel)));
}

distro_transport breakable_table() {
  example = Plugin::load(DISTRO_EXAMPLE_TRANSPORT);
  distro_transport table = example->table();
  table.open = [](const distro_transport_config* config, distro_transport_channel** channel,
                  distro_transport_error* error) {
    const auto status = example->table().open(config, channel, error);
    ranks[*channel] = config->rank;
    alarms.at(static_cast<std::size_t>(config->rank)) = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return status;
  };
  table.poll_fd = [](distro_transport_channel* channel) {
    const int both = ::epoll_create1(EPOLL_CLOEXEC);
    for (const int fd : {example->table().poll_fd(channel),
                         alarms.at(static_cast<std::size_t>(rank_of(channel)))}) {
      epoll_event readable{EPOLLIN, {}};
      ::epoll_ctl(both, EPOLL_CTL_ADD, fd, &readable);
    }
    descriptors.insert(descriptors.end(),
                       {both, alarms.at(static_cast<std::size_t>(rank_of(channel)))});
    return both;
  };
  table.send = [](distro_transport_channel* channel, std::int32_t peer, const void* data,
                  std::size_t size, distro_transport_error* error) -> std::int32_t {
    const Phase phase = phase_of(channel);
    if (phase == Phase::losing && rank_of(channel) == 0 && size >= kDataFrame) {
      ++breaks;
      for (std::size_t rank = 0; rank < 2; ++rank) {
        phases[rank] = Phase::broken;
        ::eventfd_write(alarms[rank], 1);
      }
      return DISTRO_TRANSPORT_OK;
    }
    return phase == Phase::broken || phase == Phase::down
               ? DISTRO_TRANSPORT_OK
               : example->table().send(channel, peer, data, size, error);
  };
  table.receive = [](distro_transport_channel* channel, distro_transport_event* event,
                     distro_transport_error* error) -> std::int32_t {
    auto& phase = phase_of(channel);
    if (phase == Phase::whole || phase == Phase::losing) {
      return example->table().receive(channel, event, error);
    }
    const int rank = rank_of(channel);
    event->peer = 1 - rank;
    if (phase == Phase::broken) {
      event->kind = DISTRO_TRANSPORT_DOWN;
      phase = Phase::down;
    } else {
      eventfd_t ignored = 0;
      ::eventfd_read(alarms.at(static_cast<std::size_t>(rank)), &ignored);
      event->kind = DISTRO_TRANSPORT_UP;
      phase = Phase::whole;
    }
    return DISTRO_TRANSPORT_OK;
  };
  return table;
}

TEST(PluginReconnect, NothingIsLostWhenAConnectionBreaks) {
  const distro_transport table = breakable_table();
  const auto plugin = std::make_shared<const Plugin>(&table, "breakable");
  Group group(Carrier::plugin, 2, [&](ChannelConfig& config) {
    config.plugin = plugin;
    config.resend_after = milliseconds(500);
  });
  constexpr int kMessages = 40;
  constexpr int kAhead = 10;
  constexpr std::size_t kSize = 200'000;
  group.each([&](int rank, Channel& channel) {
    const auto send = [&](int number) {
      channel.send(1 - rank, shared_pattern(kSize, static_cast<std::uint64_t>(number)));
    };
    for (int number = 0; number < kAhead; ++number) {
      send(number);
    }
    for (int number = 0; number < kMessages; ++number) {
      if (rank == 0 && (number == 5 || number == 25)) {
        for (auto& phase : phases) {
          phase = Phase::losing;
        }
      }
      if (number + kAhead < kMessages) {
        send(number + kAhead);
      }
      ASSERT_TRUE(channel.receive(1 - rank, in(seconds(10))) ==
                  pattern(kSize, static_cast<std::uint64_t>(number)));
    }
    channel.close(in(seconds(5)));
  });
  for (const int fd : descriptors) {
    ::close(fd);
  }
  EXPECT_EQ(breaks, 2);
  EXPECT_GE(group[0].counters().reconnects + group[1].counters().reconnects, 2U);
  EXPECT_GE(group[0].counters().resent_frames, 2U);
  EXPECT_FALSE(group[0].lost());
  EXPECT_FALSE(group[1].lost());
}

}  // namespace
}  // namespace distro::transport::test
