#include "transport/channel.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <limits>

#include "transport/bind.h"
#include "transport/relay_frame.h"
#include "transport/zmq_channel.h"

namespace distro::transport {

bool is_near(const ChannelConfig& config, int rank) noexcept {
  return std::ranges::find(config.near, rank) != config.near.end();
}

bool is_neighbour(const ChannelConfig& config, int rank) noexcept {
  return rank != config.rank &&
         (config.neighbours.empty() ||
          std::ranges::find(config.neighbours, rank) != config.neighbours.end());
}

ChannelConfig with_window(ChannelConfig config) noexcept {
  // In frames: what all others have under way to one rank waits in its queue at the relay
  // (RelayConfig, 512). More: where all send much at once it overflows, and they go back, as they
  // may where there are more than 33 ranks; less: one that sends alone does not fill a long line.
  const std::size_t for_all = 384 * send_chunk_bytes(config);
  const std::size_t least = 16 * send_chunk_bytes(config);
  if (!config.relay.empty() && config.world_size > 1) {
    const auto peers = static_cast<std::size_t>(config.world_size - 1);
    config.window_bytes = std::min(config.window_bytes, std::max(for_all / peers, least));
  }
  return config;
}

std::size_t send_chunk_bytes(const ChannelConfig& config) noexcept {
  // On a paced line a chunk takes a hundredth of a second: more, and what else uses the line feels
  // it; less, and headers cost more of it.
  constexpr std::uint64_t kChunksASecond = 100;
  constexpr std::uint64_t kLeast = 4096;
  if (config.rate_limit_bytes == 0) {
    return config.chunk_bytes;
  }
  return std::min<std::size_t>(config.chunk_bytes,
                               std::max(config.rate_limit_bytes / kChunksASecond, kLeast));
}
ChannelCounters& ChannelCounters::operator+=(const ChannelCounters& other) noexcept {
  socket_bytes_sent += other.socket_bytes_sent;
  socket_bytes_received += other.socket_bytes_received;
  resent_frames += other.resent_frames;
  reconnects += other.reconnects;
  rejected_frames += other.rejected_frames;
  duplicate_frames += other.duplicate_frames;
  rejected_connections += other.rejected_connections;
  return *this;
}

std::unique_ptr<Channel> open_channel(const ChannelConfig& config) {
  if (config.world_size < 1 || config.rank < 0 || config.rank >= config.world_size) {
    throw ConfigError(fmt::format("rank {} in a group of {} ranks: ranks count from 0 to {}",
                                  config.rank, config.world_size, config.world_size - 1));
  }
  if (config.chunk_bytes == 0 || config.chunk_bytes > std::numeric_limits<std::uint32_t>::max()) {
    throw ConfigError(
        fmt::format("rank {}: chunk_bytes is {}, it must be from 1 to 2^32 - 1 (64 KiB is usual)",
                    config.rank, config.chunk_bytes));
  }
  if (config.keepalive.count() <= 0 || config.timeout.count() <= 0 ||
      config.resend_after.count() <= 0) {
    throw ConfigError(
        fmt::format("rank {}: timeout, keepalive and resend_after must be above 0", config.rank));
  }
  if ((config.carrier == Carrier::plugin) != (config.plugin != nullptr)) {
    throw ConfigError(fmt::format("rank {}: the carrier is a plug-in if, and only if, one is given",
                                  config.rank));
  }
  if (!config.relay.empty() && config.carrier != Carrier::tcp) {
    throw ConfigError(fmt::format(
        "rank {}: a hub needs DISTRO_TRANSPORT=tcp: a relay is reached over TCP", config.rank));
  }
  if (!config.members.empty() &&
      (config.members.size() != static_cast<std::size_t>(config.world_size) ||
       std::ranges::any_of(config.members, [](auto member) { return member > kMaxMember; }))) {
    throw ConfigError(fmt::format("rank {}: {} members for {} ranks, or one above {}", config.rank,
                                  config.members.size(), config.world_size, kMaxMember));
  }
  if (!config.relay.empty() && static_cast<std::size_t>(config.world_size) > kMaxGroup) {
    throw ConfigError(fmt::format("rank {}: a group of {} ranks, and a relay serves at most {}",
                                  config.rank, config.world_size, kMaxGroup));
  }
  if (config.keys) {
    if (config.carrier != Carrier::tcp) {
      throw ConfigError(fmt::format(
          "rank {}: keys belong to the carrier tcp; others do not leave the host, or protect "
          "themselves",
          config.rank));
    }
    const auto ranks = static_cast<std::size_t>(config.world_size);
    if (config.keys->public_by_rank.size() != ranks ||
        (!config.keys->endpoint_by_rank.empty() && config.keys->endpoint_by_rank.size() != ranks)) {
      throw ConfigError(fmt::format("rank {}: keys of {} ranks in a group of {}", config.rank,
                                    config.keys->public_by_rank.size(), ranks));
    }
  }
  check_advertised(config);
  if (!config.relay.empty()) {
    check_relay(config);
  }
  return std::make_unique<ZmqChannel>(config);
}

}  // namespace distro::transport
