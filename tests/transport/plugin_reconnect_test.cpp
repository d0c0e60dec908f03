#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <map>

#include "tests/transport/group.h"
#include "transport/plugin.h"

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

// The example transport, whose connection between two ranks breaks on demand: frames vanish, then
// DOWN and UP are told on both sides.
enum class Phase { whole, losing, down };
std::shared_ptr<const Plugin> example;
std::array<std::atomic<Phase>, 2> phases{};
std::map<distro_transport_channel*, int> ranks;  // I/O thread

distro_transport breakable_table() {
  example = Plugin::load(DISTRO_EXAMPLE_TRANSPORT);
  distro_transport table = example->table();
  table.open = [](const distro_transport_config* config, distro_transport_channel** channel,
                  distro_transport_error* error) {
    const auto status = example->table().open(config, channel, error);
    ranks[*channel] = config->rank;
    return status;
  };
  table.send = [](distro_transport_channel* channel, std::int32_t peer, const void* data,
                  std::size_t size, distro_transport_error* error) -> std::int32_t {
    return phases[static_cast<std::size_t>(ranks[channel])] == Phase::whole
               ? example->table().send(channel, peer, data, size, error)
               : DISTRO_TRANSPORT_OK;
  };
  table.receive = [](distro_transport_channel* channel, distro_transport_event* event,
                     distro_transport_error* error) -> std::int32_t {
    const int rank = ranks[channel];
    auto& phase = phases[static_cast<std::size_t>(rank)];
    if (phase == Phase::whole) {
      return example->table().receive(channel, event, error);
    }
    event->peer = 1 - rank;
    event->kind = phase == Phase::losing ? DISTRO_TRANSPORT_DOWN : DISTRO_TRANSPORT_UP;
    phase = phase == Phase::losing ? Phase::down : Phase::whole;
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
  constexpr std::size_t kSize = 200'000;
  group.each([&](int rank, Channel& channel) {
    for (int number = 0; number < kMessages; ++number) {
      channel.send(1 - rank, shared_pattern(kSize, static_cast<std::uint64_t>(number)));
    }
    for (int number = 0; number < kMessages; ++number) {
      if (rank == 0 && (number == 5 || number == 25)) {
        for (auto& phase : phases) {
          phase = Phase::losing;
        }
      }
      ASSERT_TRUE(channel.receive(1 - rank, in(seconds(10))) ==
                  pattern(kSize, static_cast<std::uint64_t>(number)));
    }
    channel.close(in(seconds(5)));
  });
  EXPECT_GT(group[0].counters().reconnects + group[1].counters().reconnects, 0U);
  EXPECT_GT(group[0].counters().resent_frames + group[1].counters().resent_frames, 0U);
  EXPECT_FALSE(group[0].lost());
  EXPECT_FALSE(group[1].lost());
}

}  // namespace
}  // namespace distro::transport::test
