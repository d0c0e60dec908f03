#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transport/error.h"
#include "transport/keys.h"

namespace distro::transport {

using Bytes = std::vector<std::byte>;
using SharedBytes = std::shared_ptr<const Bytes>;
using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

/// How frames travel between the ranks of a group.
enum class Carrier {
  tcp,     ///< ZeroMQ over TCP.
  ipc,     ///< ZeroMQ over Unix sockets in a private directory: ranks of one host.
  inproc,  ///< ZeroMQ within one process: ranks that are threads.
  plugin,  ///< A third-party transport, loaded by path (transport/abi.h).
};

/// What of a process's traffic goes first where it is limited.
enum class Priority : std::uint8_t {
  exchange,  ///< Small records that the next step needs.
  exact,     ///< Whole tensors.
};

/// The highest number that a member of a hub may have.
inline constexpr std::uint32_t kMaxMember = 65534;

/// What a rank publishes in the rendezvous, so that its peers can find and recognise it.
struct PeerAddress {
  std::string endpoint;        ///< Where to connect to, in the words of the carrier.
  std::uint64_t session = 0;   ///< Random; tells this incarnation of the rank from an earlier one.
  std::uint32_t protocol = 0;  ///< Version of the session protocol.
  std::string host;      ///< Identity of the host and its pid namespace; equal strings: same host.
  std::int64_t pid = 0;  ///< Process, meaningful to ranks with an equal `host` only.
  std::uint64_t pid_start =
      0;  ///< Start time of the process in clock ticks, against reuse of a pid.
};

class Plugin;

/// The largest message. The inbox, the outbox and what is kept for later all come from it.
inline constexpr std::size_t kMaxMessageBytes = std::size_t{1} << 30;

/// What one rank may be ahead of another: two messages, that of the exchange which travels and that
/// of the next. Less: a rank is refused while it does nothing wrong; more: a hostile or hanging one
/// takes more memory.
inline constexpr std::size_t kMaxBytesAhead = 2 * kMaxMessageBytes;

/// Options of one group's channel. Sizes in bytes. The defaults are for the internet; tests shrink
/// them.
struct ChannelConfig {
  int rank = 0;
  int world_size = 1;
  /// Ranks to connect to; empty: all others. Who is a neighbour of whom is mutual, and there is a
  /// way from each rank to each: losses are told along it.
  std::vector<int> neighbours = {};
  std::uint64_t group = 0;  ///< Random number of the group, the same on all its ranks.
  /// tcp: endpoint of the relay that carries all between the ranks, so that none of them binds
  /// (hub); empty: each dials the others (mesh).
  std::string relay = {};
  /// Hub: what the relay calls the ranks, by rank; each at most kMaxMember. Empty: their ranks.
  std::vector<std::uint32_t> members = {};
  /// Ranks of the own site: reached directly even where there is a relay, and without a rate limit.
  std::vector<int> near = {};
  /// Bytes a second that this process may send over all its channels; 0: no limit.
  std::uint64_t rate_limit_bytes = 0;
  Priority priority = Priority::exchange;  ///< Which channel of the process goes first.
  Carrier carrier = Carrier::tcp;
  std::shared_ptr<const Plugin> plugin;    ///< Carrier::plugin: the loaded library.
  std::string bind_address = "127.0.0.1";  ///< tcp: address to bind.
  std::string advertise;                   ///< tcp: host told to peers; empty: bind_address.
  std::uint16_t first_port = 0;            ///< tcp: range of ports to bind; 0: any free port.
  std::uint16_t last_port = 0;
  /// Frames that the carrier queues for one connection. Fewer: the I/O thread wakes for each chunk;
  /// more: acknowledgements and aborts wait behind more data on a slow link.
  int queue_frames = 16;
  /// tcp: encrypt, and take a connection for a rank's if, and only if, it has that rank's key.
  std::optional<Keys> keys = {};
  bool insecure = false;  ///< Allow plain text beyond loopback (DISTRO_INSECURE=1).
  std::chrono::milliseconds timeout{std::chrono::minutes(30)};  ///< The group's time-out.
  std::size_t chunk_bytes = std::size_t{64} << 10;
  std::size_t window_bytes = std::size_t{8} << 20;  ///< Unacknowledged bytes in flight to one peer.
  std::size_t inbox_bytes =
      std::size_t{256}
      << 20;  ///< Received and not yet taken, per peer: above it, acknowledgements wait.
  std::size_t max_message_bytes = kMaxMessageBytes;
  /// Sent and not yet acknowledged, per peer: above it, send throws PeerBacklog, but one message is
  /// always taken. An honest group never comes near it, for its ranks wait for each other.
  std::size_t outbox_bytes = kMaxBytesAhead;
  std::chrono::milliseconds resend_after{
      10'000};  ///< No progress of acknowledgements for so long: resend.
  std::chrono::milliseconds keepalive{5'000};
};

/// Counters since the channel was opened. "Socket bytes" is everything the carrier was given and
/// gave: headers, acknowledgements, hellos and resends included.
struct ChannelCounters {
  std::uint64_t socket_bytes_sent = 0;
  std::uint64_t socket_bytes_received = 0;
  std::uint64_t resent_frames = 0;
  std::uint64_t reconnects = 0;
  std::uint64_t rejected_frames = 0;  ///< Malformed, stale or from strangers.
  std::uint64_t duplicate_frames = 0;
  /// Connections to this rank that ended before they had brought a frame, and tries to connect from
  /// here that failed in the carrier's greeting: strangers, wrong keys.
  std::uint64_t rejected_connections = 0;

  ChannelCounters& operator+=(const ChannelCounters& other) noexcept;
};

/// The same with the window to each peer that the group's way allows.
[[nodiscard]] ChannelConfig with_window(ChannelConfig config) noexcept;

/// Largest chunk that this rank sends: a paced one must not hold up what else uses the line.
[[nodiscard]] std::size_t send_chunk_bytes(const ChannelConfig& config) noexcept;

/// Whether a rank is of the own site (ChannelConfig::near).
[[nodiscard]] bool is_near(const ChannelConfig& config, int rank) noexcept;

/// Whether a rank is one that this one connects to.
[[nodiscard]] bool is_neighbour(const ChannelConfig& config, int rank) noexcept;

/// Reliable, ordered messages between the ranks of one group, with deadlines. A "peer" is a
/// neighbour (ChannelConfig::neighbours). All members are thread-safe except that close() must be
/// the last call. The sockets belong to the process's one I/O thread.
class Channel {
 public:
  virtual ~Channel() = default;

  /// What peers need to reach this rank.
  [[nodiscard]] virtual PeerAddress address() const = 0;

  /// Start connecting to all peers; `peers[r]` is rank r's address; those of others are ignored.
  /// Returns at once. Throws ProtocolError when a peer speaks another protocol version (names it).
  virtual void connect(std::vector<PeerAddress> peers) = 0;

  /// Queue a message for `peer`. Returns at once; messages to one peer arrive in order, each
  /// exactly once. Throws PeerError if the peer is lost or has left, ClosedError if the channel is
  /// closed, PeerBacklog if the peer does not take what was sent before.
  virtual void send(int peer, SharedBytes message) = 0;

  /// Queue one message for several peers, as send() does for one; through a hub it is uploaded
  /// once. Returns those that have left: nothing was sent to them. Throws what send() throws for
  /// the others, once all have been tried.
  virtual std::vector<int> multicast(std::span<const int> peers, const SharedBytes& message) = 0;

  /// The next message from `peer`. Messages that have arrived are handed out first; then throws
  /// PeerLost (of whichever rank of the group is lost, for it will be waited for in vain), PeerLeft
  /// (of `peer`), or PeerTimeout at the deadline, with who is late, by how much and when it was
  /// last heard. Throws ClosedError if the channel is closed.
  virtual Bytes receive(int peer, Deadline deadline) = 0;

  /// As receive, but an empty optional at once if nothing has arrived and nobody is lost.
  virtual std::optional<Bytes> try_receive(int peer) = 0;

  /// A message, and who sent it.
  struct Arrival {
    int peer;
    Bytes message;
  };

  /// The next message from any peer; those that have sent more than others do not hold those up.
  /// Empty at the deadline, or when wake() was called. Messages that have arrived are handed out
  /// first; then throws PeerLost (as receive), PeerLeft (of each peer once), or ClosedError. For
  /// one thread at a time.
  virtual std::optional<Arrival> receive_any(Deadline deadline) = 0;

  /// The receive_any() under way, or the next one, comes back at once, with a message or empty.
  virtual void wake() = 0;

  /// Tell all peers that the group cannot go on because of `culprit` (may be this rank). Every
  /// receive on every rank then throws PeerLost of the culprit, once the messages that arrived
  /// before are taken. Returns at once.
  virtual void abort(int culprit, std::string_view reason) = 0;

  /// Ask all peers for an answer, and wait until those that are connected have given one, or until
  /// `until`. After abort(): a process that ends the moment it returns takes the news with it.
  virtual void await_answers(Deadline until) noexcept = 0;

  /// The first rank known to be lost, with the reason; empty if there is none.
  [[nodiscard]] virtual std::optional<PeerLost> lost() const = 0;

  /// Who is to blame when something beside this channel broke and names nobody: the first lost
  /// rank; else, by `until`, one that has left (PeerLeft), whose connection is broken (PeerLost),
  /// or that does not answer (PeerTimeout). Asks all peers for an answer; returns as soon as all
  /// have given one or one is lost. If they have, and some ranks are no neighbours, waits twice as
  /// long again for news of those. Empty if all are well, or the channel is closed.
  [[nodiscard]] virtual std::optional<PeerError> suspect(Deadline until) const = 0;

  /// What is known to be wrong with the way to a peer at this moment: that its connection broke,
  /// that the relay is out of reach, or why a rank is lost; empty if nothing is. Returns at once.
  [[nodiscard]] virtual std::string trouble(int peer) const = 0;

  /// How long a peer may stay disconnected from now on.
  virtual void set_timeout(std::chrono::milliseconds timeout) = 0;

  [[nodiscard]] virtual ChannelCounters counters() const = 0;

  /// Deliver what was sent (until acknowledged by every living peer, or the deadline), say goodbye,
  /// close the sockets. Never throws; what could not be delivered is logged. Idempotent. The
  /// destructor closes without delivering.
  virtual void close(Deadline deadline) noexcept = 0;
};

/// Bind this rank's endpoint. Throws ConfigError.
std::unique_ptr<Channel> open_channel(const ChannelConfig& config);

/// The identity string of this host for PeerAddress::host.
std::string host_identity();

}  // namespace distro::transport
