#include "backend/exchange/rendezvous.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "backend/exchange/placement.h"
#include "backend/exchange/text.h"
#include "transport/bind.h"

namespace distro::exchange {
namespace {

using nlohmann::json;

// Version of what ranks tell each other in the store and in records, and of the bits that codecs
// make of records. Ranks of different versions do not mix.
constexpr int kVersion = 4;

// How long a rank that cannot start waits for others to tell it to. Shorter leaves those that come
// later to their time-out, longer keeps back what is wrong from the user.
constexpr std::chrono::milliseconds kPatienceToDecline{10'000};

struct Hello {
  int version = 0;
  std::uint64_t group = 0;
  Placement placement;
  std::string site;
  std::string key;  // public; empty: none
  StringMap options;
};

std::uint64_t random_number() {
  std::random_device device;
  return (std::uint64_t{device()} << 32) | device();
}

[[noreturn]] void fail_absent(const Identity& identity, int rank, std::string_view what,
                              std::string_view why) {
  throw transport::PeerTimeout(rank, fmt::format("rank {}: rank {} did not come to the rendezvous "
                                                 "({}): {}. Is it running, with the same "
                                                 "backend, and can it reach the store?",
                                                 identity.rank, rank, what, why));
}

// Look again and again, ever more rarely. False: not true before the deadline.
template <typename Look>
bool look_until(transport::Deadline deadline, Look&& look) {
  // Rarer delays the start of a group by as much; more often loads a store that all ranks ask.
  constexpr std::chrono::milliseconds kLongest{32};
  for (std::chrono::milliseconds pause{1}; !look(); pause = std::min(2 * pause, kLongest)) {
    if (transport::Clock::now() >= deadline) {
      return false;
    }
    std::this_thread::sleep_for(pause);
  }
  return true;
}

// The keys of one meeting. What is in the store may be of earlier meetings: torchrun's outlives the
// ranks that it restarts, whenever and in whatever number they died. So rank 0 draws a number for
// the meeting, under which all keys are. The others know that the number which they find is not of
// an earlier meeting by a welcome that repeats a number of their own.
class Board {
 public:
  // Throws PeerTimeout on ranks that rank 0 does not welcome within `patience`.
  Board(BlobStore& store, const Identity& identity, std::chrono::milliseconds patience)
      : store_(store), identity_(identity), deadline_(transport::Clock::now() + patience) {
    if (identity.rank == 0) {
      round_ = random_number();
      store.set(kRound, std::to_string(round_));
    } else {
      come();
    }
  }

  [[nodiscard]] std::uint64_t round() const noexcept { return round_; }

  // What this rank begins with. Rank 0 waits for the others, which do not begin before; throws
  // PeerTimeout when one does not come.
  void hello(const json& value) {
    set("hello", value);
    if (identity_.rank == 0) {
      welcome();
    }
  }
  void address(const json& value) { set("address", value); }
  [[nodiscard]] std::string get(const std::string& what, int rank) {
    return store_.get(key(what, rank));
  }

 private:
  static constexpr const char* kRound = "distro/round";

  void set(const std::string& what, const json& value) {
    store_.set(key(what, identity_.rank), value.dump());
  }
  template <typename Name>
  [[nodiscard]] std::string key(const std::string& what, const Name& name) const {
    return fmt::format("distro/{}/{}/{}", round_, what, name);
  }

  void come() {
    const std::string own = std::to_string(random_number());
    std::string found;
    const bool welcomed = look_until(deadline_, [&] {
      if (!store_.has(kRound)) {
        return false;
      }
      if (const std::string round = store_.get(kRound); round != found) {
        found = round;
        const auto* const end = found.data() + found.size();
        if (std::from_chars(found.data(), end, round_).ptr != end) {
          throw ExchangeError(
              fmt::format("rank {}: what rank 0 published in the store as the "
                          "meeting's number cannot be read",
                          identity_.rank));
        }
        store_.set(key("here", identity_.rank), own);
      }
      return store_.has(key("welcome", own));
    });
    if (!welcomed) {
      fail_absent(identity_, 0, "welcome", "time-out");
    }
  }

  void welcome() {
    std::vector<int> absent;
    for (int rank = 1; rank < identity_.world_size; ++rank) {
      absent.push_back(rank);
    }
    const auto greet = [&](int rank) {
      if (!store_.has(key("here", rank))) {
        return false;
      }
      store_.set(key("welcome", printable(store_.get(key("here", rank)), kLargestNumberBytes)), "");
      return true;
    };
    if (!look_until(deadline_, [&] {
          std::erase_if(absent, greet);
          return absent.empty();
        })) {
      fail_absent(identity_, absent.front(), "here", "time-out");
    }
  }

  static constexpr std::size_t kLargestNumberBytes = 20;  // of 64 bits, in decimal

  BlobStore& store_;
  const Identity& identity_;
  const transport::Deadline deadline_;
  std::uint64_t round_ = 0;
};

std::string get(Board& board, const std::string& what, int rank, const Identity& identity) {
  try {
    return board.get(what, rank);
  } catch (const std::exception& error) {
    fail_absent(identity, rank, what, error.what());
  }
}

// What rank `rank` published under `what`. The store is open to whoever reaches it, so its text is
// checked like any input.
template <typename Read>
auto read(Board& board, const std::string& what, int rank, const Identity& identity,
          Read&& from_json) {
  const std::string text = get(board, what, rank, identity);
  try {
    const json blob = json::parse(text);
    if (blob.contains("error")) {
      throw ExchangeError(fmt::format("rank {}: rank {} cannot start: {}", identity.rank, rank,
                                      blob.at("error").get<std::string>()));
    }
    return from_json(blob);
  } catch (const json::exception& error) {
    throw ExchangeError(
        fmt::format("rank {}: what rank {} published in the store as '{}' cannot be read: {}",
                    identity.rank, rank, what, error.what()));
  }
}

// "k: ranks 0, 1 have 6; rank 2 has 8", or nothing if all have the same.
std::string difference(const std::string& option,
                       const std::map<std::string, std::vector<int>>& ranks_by_value) {
  if (ranks_by_value.size() < 2) {
    return {};
  }
  std::vector<std::string> parts;
  for (const auto& [value, ranks] : ranks_by_value) {
    parts.push_back(
        fmt::format("{} {} {}", ranks_text(ranks), ranks.size() == 1 ? "has" : "have", value));
  }
  return fmt::format("{}: {}", option, fmt::join(parts, "; "));
}

void compare(const std::vector<Hello>& hellos) {
  std::map<std::string, std::map<std::string, std::vector<int>>> table;
  for (std::size_t rank = 0; rank < hellos.size(); ++rank) {
    table["torch-distro's store protocol"][std::to_string(hellos[rank].version)].push_back(
        static_cast<int>(rank));
    for (const auto& [option, value] : hellos[rank].options) {
      table[option][value].push_back(static_cast<int>(rank));
    }
  }
  std::vector<std::string> differences;
  for (const auto& [option, values] : table) {
    if (auto text = difference(option, values); !text.empty()) {
      differences.push_back(std::move(text));
    }
  }
  if (!differences.empty()) {
    throw ExchangeError(fmt::format(
        "the ranks of this group do not agree: {}. Give all ranks the same DISTRO_ variables, "
        "pg_options and version of torch-distro.",
        fmt::join(differences, ". ")));
  }
}

// Address of this host on the way to the others. Ranks of one host need none that others can reach,
// and so no permission to be open to them.
std::string route(const Identity& identity, bool one_host) {
  return one_host || identity.route.empty() ? "127.0.0.1" : identity.route;
}

// What peers are told of a rank that listens on every address: the one on the way to the store, for
// from there they come. Empty where none is known that `bind` takes in: the user has to say.
std::string address_to_tell(const Identity& identity, const std::string& bind, bool one_host) {
  const auto is_ipv6 = [](const std::string& text) { return text.find(':') != std::string::npos; };
  std::string address = identity.route;
  if (address.empty() && one_host) {
    address = "127.0.0.1";
  }
  return is_ipv6(address) && !is_ipv6(bind) ? "" : address;
}

transport::ChannelConfig channel_config(const Identity& identity, const Options& options,
                                        std::uint64_t group, bool one_host,
                                        const std::optional<transport::Keys>& keys) {
  transport::ChannelConfig config;
  config.keys = keys;
  config.rank = identity.rank;
  config.world_size = identity.world_size;
  config.group = group;
  config.carrier = options.carrier;
  config.plugin = options.plugin;
  config.bind_address = options.bind.empty() ? route(identity, one_host) : options.bind;
  config.advertise = options.advertise.empty() && transport::is_every_address(config.bind_address)
                         ? address_to_tell(identity, config.bind_address, one_host)
                         : options.advertise;
  config.first_port = options.first_port;
  config.last_port = options.last_port;
  if (options.hub) {
    config.relay = options.relay;
    for (const int member : identity.world_ranks) {
      config.members.push_back(static_cast<std::uint32_t>(member));
    }
  }
  config.rate_limit_bytes = options.rate_limit_bytes;
  config.insecure = options.insecure;
  config.timeout = identity.timeout;
  return config;
}

using Addresses = std::vector<transport::PeerAddress>;  // by rank

// Publish where this rank's channels are, and read where those of the others are. The second
// channel (null: there is none) is another endpoint of the same process.
void exchange_addresses(Board& board, const Identity& identity, const transport::Channel& channel,
                        const transport::Channel* exact, Addresses& peers, Addresses& exact_peers) {
  const transport::PeerAddress own = channel.address();
  json told{{"endpoint", own.endpoint}, {"session", own.session}, {"protocol", own.protocol},
            {"host", own.host},         {"pid", own.pid},         {"pid_start", own.pid_start}};
  if (exact != nullptr) {
    told["exact_endpoint"] = exact->address().endpoint;
    told["exact_session"] = exact->address().session;
  }
  board.address(told);
  for (int rank = 0; rank < identity.world_size; ++rank) {
    read(board, "address", rank, identity, [&](const json& blob) {
      transport::PeerAddress& peer = peers.emplace_back(
          transport::PeerAddress{blob.at("endpoint"), blob.at("session"), blob.at("protocol"),
                                 blob.at("host"), blob.at("pid"), blob.at("pid_start")});
      if (exact != nullptr) {
        exact_peers.push_back(peer);
        exact_peers.back().endpoint = blob.at("exact_endpoint");
        exact_peers.back().session = blob.at("exact_session");
      }
    });
  }
}

int world_rank(const Identity& identity, int rank) {
  return identity.world_ranks.empty() ? rank
                                      : identity.world_ranks.at(static_cast<std::size_t>(rank));
}

// This rank's keys, if it has some.
std::optional<transport::Keys> keys_of(const Identity& identity, const Options& options) {
  if (!options.has_keys()) {
    return std::nullopt;
  }
  std::vector<int> world_ranks;
  for (int rank = 0; rank < identity.world_size; ++rank) {
    world_ranks.push_back(world_rank(identity, rank));
  }
  return transport::load_keys(options.curve_secret_file, options.curve_peers_file, identity.rank,
                              world_ranks);
}

// Whether every rank says that it has the key which the peers file has of it. The file is the
// authority: what the store says is never taken for a key, but a difference would end in a
// time-out.
void check_keys(const std::vector<Hello>& hellos, const transport::Keys& keys,
                const Identity& identity, const Options& options) {
  for (std::size_t rank = 0; rank < hellos.size(); ++rank) {
    if (hellos[rank].key != keys.public_by_rank[rank]) {
      const int world = world_rank(identity, static_cast<int>(rank));
      throw transport::ConfigError(fmt::format(
          "the ranks' keys do not agree: rank {0} has the public key {1}, and rank {2} has {3} for "
          "it in its peers file {4}. Find out which is right, and give all ranks the same file",
          world, printable(hellos[rank].key, transport::kZ85KeyBytes),
          world_rank(identity, identity.rank), keys.public_by_rank[rank],
          options.curve_peers_file));
    }
  }
}

// The number of a group's second channel, which a relay must not take for the first.
std::uint64_t exact_number(std::uint64_t group) { return ~group; }

}  // namespace

std::string ranks_text(const std::vector<int>& ranks) {
  return fmt::format("{} {}", ranks.size() == 1 ? "rank" : "ranks", fmt::join(ranks, ", "));
}

Meeting meet(BlobStore& store, const Identity& identity, const Options& options) {
  Board board(store, identity, identity.timeout);
  const std::string host = transport::host_identity();
  std::optional<transport::Keys> keys;
  try {
    keys = keys_of(identity, options);
  } catch (const transport::ConfigError& error) {
    board.hello(json{{"error", error.what()}});
    throw;
  }
  board.hello(json{{"version", kVersion},
                   {"group", random_number()},
                   {"host", host},
                   {"devices", identity.devices},
                   {"site", site_label(options.site, host)},
                   {"key", keys ? keys->own.public_key : ""},
                   {"options", options.agreed()}});
  std::vector<Hello> hellos;
  for (int rank = 0; rank < identity.world_size; ++rank) {
    hellos.push_back(read(board, "hello", rank, identity, [](const json& blob) {
      return Hello{
          blob.at("version"),     blob.at("group"),      {blob.at("host"), blob.at("devices")},
          blob.value("site", ""), blob.value("key", ""), blob.at("options")};
    }));
  }
  compare(hellos);

  std::vector<Placement> placements;
  std::vector<std::string> sites;
  for (const auto& hello : hellos) {
    placements.push_back(hello.placement);
    if (!is_site(hello.site) && hello.site != site_label("host", hello.placement.host)) {
      throw ExchangeError(fmt::format("rank {}: rank {} published a site that is no label: {}",
                                      identity.rank, sites.size(),
                                      printable(hello.site, kMaxSiteBytes)));
    }
    sites.push_back(hello.site);
  }
  if (const std::string forgotten = forgotten_site(sites, placements); !forgotten.empty()) {
    throw ExchangeError(
        fmt::format("{}. Give all ranks of a host a site, or none of them.", forgotten));
  }
  const auto local = std::ranges::count(placements, host, &Placement::host);
  Meeting meeting;
  meeting.round = board.round();
  meeting.sites = Sites(sites);
  std::vector<Placement> near;
  for (const int member : meeting.sites.site_of(identity.rank)) {
    near.push_back(placements[static_cast<std::size_t>(member)]);
  }
  meeting.site_own_devices = each_can_have_its_own(near);
  meeting.own_devices = each_can_have_its_own(placements);
  meeting.local_ranks = static_cast<int>(std::max<std::ptrdiff_t>(local, 1));
  // Through a hub only those of the own site dial this rank.
  const auto all_here = [&](const std::vector<Placement>& ranks) {
    return std::ranges::count(ranks, host, &Placement::host) ==
           static_cast<std::ptrdiff_t>(ranks.size());
  };
  const bool one_host = all_here(options.hub ? near : placements);
  auto config = channel_config(identity, options, hellos.front().group, one_host, keys);
  if (meeting.sites.participants() < identity.world_size) {
    config.neighbours = meeting.sites.neighbours(identity.rank);
    config.near = meeting.sites.others_of_site(identity.rank);
  }
  meeting.bind_address = transport::is_every_address(config.bind_address)
                             ? route(identity, one_host)
                             : config.bind_address;
  try {
    if (keys) {
      check_keys(hellos, *keys, identity, options);
    }
    meeting.channel = transport::open_channel(config);
    if (options.own_transport()) {
      config.neighbours.clear();  // exact collectives know no sites
      config.group = exact_number(config.group);
      config.priority = transport::Priority::exact;
      meeting.exact_channel = transport::open_channel(config);
    }
  } catch (const std::exception& error) {
    // The others wait for this rank's address: tell them why it will not come.
    board.address(json{{"error", error.what()}});
    throw;
  }
  Addresses peers;
  Addresses exact_peers;
  exchange_addresses(board, identity, *meeting.channel, meeting.exact_channel.get(), peers,
                     exact_peers);
  meeting.channel->connect(std::move(peers));
  if (meeting.exact_channel) {
    meeting.exact_channel->connect(std::move(exact_peers));
  }
  return meeting;
}

void decline(BlobStore& store, const Identity& identity, const std::string& reason) {
  try {
    Board(store, identity, std::min(identity.timeout, kPatienceToDecline))
        .hello(json{{"error", reason}});
  } catch (const transport::PeerTimeout&) {  // NOLINT(bugprone-empty-catch): who is not there
  }                                          // finds this rank missing
}

}  // namespace distro::exchange
