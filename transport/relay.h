#pragma once

#include <atomic>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>
#include <zmq.hpp>

#include "transport/acceptor.h"
#include "transport/channel.h"
#include "transport/keys.h"
#include "transport/probes.h"
#include "transport/relay_frame.h"
#include "transport/zap.h"

namespace distro::transport {

/// Options of a relay. The defaults are for the internet; tests shrink them.
struct RelayConfig {
  std::string bind_address = "127.0.0.1";  ///< Address or interface to bind.
  std::uint16_t port = 0;                  ///< 0: any free port.
  bool insecure = false;                   ///< Allow plain text beyond loopback.
  /// With keys: of each run that it serves (load_relay_keys), all with the relay's own pair. A rank
  /// joins groups of the run that its key belongs to, in its own name. Empty: no keys.
  std::vector<Keys> runs = {};
  /// Frames that wait for one rank at most (each up to a chunk, shared where several wait for the
  /// same): above it they are dropped, and sent again by their senders.
  int queue_frames = 512;
  std::size_t max_ranks = 4096;  ///< Of all groups together.
  std::size_t chunk_bytes = std::size_t{64} << 10;
  std::chrono::milliseconds keepalive{5'000};
};

/// What a relay did since it began.
struct RelayCounters {
  std::uint64_t bytes_received = 0;
  std::uint64_t bytes_sent = 0;
  std::uint64_t frames = 0;           ///< Handed to ranks.
  std::uint64_t dropped_frames = 0;   ///< For want of space, or of the rank: sent again later.
  std::uint64_t rejected_frames = 0;  ///< Malformed, or of strangers.
  std::uint64_t refused_joins = 0;
  std::uint64_t rejected_connections = 0;  ///< Ended before they had brought a frame.
  std::size_t groups = 0;                  ///< Now.
  std::size_t ranks = 0;                   ///< Now.
};

/// Passes frames on between the ranks of groups, each of which dials it: a frame comes once and
/// goes to all for whom it is. Keeps none but those that wait for a connection's space, and knows
/// nothing of what they hold. When it loses some, and when it restarts, the ranks' sessions send
/// them again. One thread.
class Relay {
 public:
  /// Binds. Throws ConfigError.
  explicit Relay(const RelayConfig& config);
  ~Relay();
  Relay(const Relay&) = delete;
  Relay& operator=(const Relay&) = delete;

  [[nodiscard]] const std::string& endpoint() const noexcept { return acceptor_->endpoint(); }

  /// Serve until `stop` is set (looked at ten times a second).
  void run(const std::atomic<bool>& stop);

  [[nodiscard]] RelayCounters counters() const noexcept;

 private:
  struct Group;

  struct Member {
    Group* group = nullptr;
    std::uint16_t number = 0;
    std::string route;
    bool clogged = false;  // its queue was full: nothing goes to it until there is space
    bool gone = false;     // what it sent before is still read, then it is removed
  };

  // Two members between whom frames were lost, or one of whom has come or gone. Until both know,
  // nothing passes between them: a greeting that overtakes the news would be taken for one of the
  // time before, and the two would wait for each other for ever.
  struct Reset {
    struct Side {
      bool absent_due = false;
      bool present_due = false;
    };
    Side low;   // what the lower number has to hear of the higher
    Side high;  // and the other way
  };
  using Pair = std::pair<std::uint16_t, std::uint16_t>;  // ascending

  // Runs know nothing of each other, whatever numbers their groups draw.
  struct GroupName {
    int run = 0;
    std::uint64_t number = 0;
    auto operator<=>(const GroupName&) const = default;
  };

  struct Group {
    GroupName name;
    std::map<std::uint16_t, Member> members;
    std::map<Pair, Reset> resets;
  };

  Deadline work(Deadline now);
  void take(const std::string& route, const zmq::message_t& body);
  void on_join(const std::string& route, const RelayMessage& join, std::optional<int> user);
  void on_forward(Member& from, const RelayMessage& forward);
  void refuse(const std::string& route, std::string_view reason);
  void reject(std::string_view why);
  SendResult send(const std::string& route, zmq::message_t& message);
  // Hand the message over, or mark the member as clogged or gone.
  bool pass(Member& to, zmq::message_t& message);
  // The two are to hear that the other is absent, and then that it is present.
  void reset(Group& group, std::uint16_t a, std::uint16_t b);
  // Tell both sides what they have to hear, as far as there is space; true: all is told.
  bool advance(Group& group, const Pair& pair, Reset& reset);
  bool notify(Group& group, std::uint16_t whom, RelayKind kind, std::uint16_t about, bool& due);
  void settle(Group& group);
  void mark_gone(Member& member);
  void remember(const std::string& route);
  void remove_gone();
  void probe(Deadline now);
  void count();

  const RelayConfig config_;
  const ChannelConfig socket_config_;
  zmq::context_t context_;
  std::optional<ZapHandler> zap_;
  std::unique_ptr<Acceptor> acceptor_;
  std::map<GroupName, Group> groups_;
  std::unordered_map<std::string, Member*> routes_;
  std::vector<std::string> gone_;  // routes of members to be removed, once what they sent is read
  Deadline gone_since_ = Deadline::max();
  std::unordered_set<std::string> former_;  // routes of members that were removed lately
  Deadline retry_at_ = Deadline::max();
  Probes probes_;

  struct Live {
    std::atomic<std::uint64_t> bytes_received{0};
    std::atomic<std::uint64_t> bytes_sent{0};
    std::atomic<std::uint64_t> frames{0};
    std::atomic<std::uint64_t> dropped_frames{0};
    std::atomic<std::uint64_t> rejected_frames{0};
    std::atomic<std::uint64_t> refused_joins{0};
    std::atomic<std::uint64_t> rejected_connections{0};
    std::atomic<std::size_t> groups{0};
    std::atomic<std::size_t> ranks{0};
  };
  Live live_;
};

}  // namespace distro::transport
