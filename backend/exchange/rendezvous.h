#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "backend/exchange/options.h"
#include "backend/exchange/sites.h"
#include "transport/channel.h"

namespace distro::exchange {

/// The key-value store in which ranks find each other (torch's c10d Store, through the c10d room).
class BlobStore {
 public:
  virtual ~BlobStore() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  /// Waits until the key is there. Throws std::exception when it is not within the store's own
  /// time-out.
  virtual std::string get(const std::string& key) = 0;
  /// Whether the key is there. Does not wait.
  virtual bool has(const std::string& key) = 0;
};

/// Who this rank is when it meets the others.
struct Identity {
  int rank = 0;
  int world_size = 1;
  std::chrono::milliseconds timeout{};
  std::string route;  ///< Address of this host on the way to the store; empty: unknown.
  /// Accelerators that this rank's collective library may use, by names unique on the host.
  std::vector<std::string> devices = {};
  /// Rank in the world by rank of the group, which is how files of keys count; empty: the same.
  std::vector<int> world_ranks = {};
};

/// A group whose ranks have met: same version, same options.
struct Meeting {
  std::unique_ptr<transport::Channel> channel;  ///< Open and connecting.
  /// Another one, of all ranks, for exact collectives; null where Options::own_transport() is not.
  std::unique_ptr<transport::Channel> exact_channel;
  int local_ranks = 1;            ///< Ranks on this host, this one included.
  bool own_devices = false;       ///< Every rank can have an accelerator for itself.
  std::uint64_t round = 0;        ///< Number of this meeting: random, and the same on all ranks.
  std::string bind_address;       ///< Address of this host that peers may reach.
  Sites sites = Sites::none(1);   ///< Which ranks act as one.
  bool site_own_devices = false;  ///< As own_devices, of the ranks of the own site.
};

/// Meet the other ranks of the group in the store, compare versions and options, and open the
/// channels. What earlier meetings have left in the store, complete or not and of however many
/// ranks, does no harm if their ranks are gone, or have left their group and come again. Throws
/// ExchangeError on every rank when ranks differ (naming ranks, option and values), when some ranks
/// of a host have a site and some have none, when a rank's key is another than the peers file of
/// one of them says, or when a rank could not read its keys or open its channel;
/// transport::ConfigError on the rank that could not; transport::PeerTimeout when a rank does not
/// come.
Meeting meet(BlobStore& store, const Identity& identity, const Options& options);

/// Instead of meet(): let the others know that this rank cannot start, so that they do not wait for
/// it. Waits a moment for them to come.
void decline(BlobStore& store, const Identity& identity, const std::string& reason);

/// "rank 2", "ranks 0, 1": how error texts name ranks.
std::string ranks_text(const std::vector<int>& ranks);

}  // namespace distro::exchange
