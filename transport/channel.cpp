#include "transport/channel.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <limits>

#include "transport/bind.h"
#include "transport/zmq_channel.h"

namespace distro::transport {

bool is_neighbour(const ChannelConfig& config, int rank) noexcept {
  return rank != config.rank &&
         (config.neighbours.empty() ||
          std::ranges::find(config.neighbours, rank) != config.neighbours.end());
}

std::vector<int> Channel::multicast(std::span<const int> peers, const SharedBytes& message) {
  std::vector<int> left;
  std::exception_ptr error;
  for (const int peer : peers) {
    try {
      send(peer, message);
    } catch (const PeerLeft&) {
      left.push_back(peer);
    } catch (...) {
      error = error ? error : std::current_exception();
    }
  }
  if (error) {
    std::rethrow_exception(error);
  }
  return left;
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
  check_advertised(config);
  return std::make_unique<ZmqChannel>(config);
}

}  // namespace distro::transport
