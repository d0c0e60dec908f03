#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <random>
#include <span>
#include <unordered_map>
#include <vector>

#include "integration/emulator/flow_table.h"
#include "integration/emulator/lane.h"
#include "integration/emulator/packet.h"
#include "integration/emulator/packet_pool.h"

namespace distro::emulator {

/// The line between a host and the middle of the internet.
struct Line {
  double up_mbit = 0;    ///< Mbit/s from the host; 0: no limit.
  double down_mbit = 0;  ///< Mbit/s to the host; 0: no limit.
  double delay_ms =
      0;  ///< One way, to the middle: the round trip of two hosts takes twice the sum.
  double jitter_ms = 0;    ///< Each packet takes up to so much longer; their order stays.
  double loss = 0;         ///< Probability, of each packet in either direction.
  double reorder = 0;      ///< Probability that a packet which is sent is overtaken by later ones.
  double duplicate = 0;    ///< Probability that a packet which is sent arrives twice.
  double queue_ms = 100;   ///< What may wait before the line, in either direction, as time.
  double queue_bytes = 0;  ///< The same as bytes, which wins; 0: by queue_ms.
  bool nat = false;        ///< Only answers to what the host began reach it.
};

/// Packets of a host, since the start. `up`: from the host.
struct Counters {
  std::uint64_t sent_packets = 0;  ///< That passed the queue: what the line carried, lost or not.
  std::uint64_t sent_bytes = 0;    ///< IP headers included.
  std::uint64_t received_packets = 0;
  std::uint64_t received_bytes = 0;
  std::uint64_t dropped_up = 0;  ///< Before a full queue.
  std::uint64_t dropped_down = 0;
  std::uint64_t lost_up = 0;  ///< By the line's probability.
  std::uint64_t lost_down = 0;
  std::uint64_t cut_up = 0;  ///< While a line or the way of a pair was cut.
  std::uint64_t cut_down = 0;
  std::uint64_t reordered = 0;
  std::uint64_t duplicated = 0;
  std::uint64_t refused = 0;     ///< By NAT.
  std::uint64_t unroutable = 0;  ///< To nobody, or from an address that is not the host's.
  std::uint64_t malformed = 0;   ///< No IPv4 packet.
};

/// An internet in memory: what each host's line does to packets. Knows no clock and no device. All
/// memory is taken at the start. Not thread-safe.
class Network {
 public:
  using Deliver = std::function<void(std::size_t host, std::span<const std::byte> packet)>;

  /// \param addresses one a host, all different.
  /// \param capacity packets under way at once; what comes beyond is dropped.
  /// \param seed of loss, jitter, reordering and duplication.
  Network(const std::vector<Address>& addresses, std::size_t capacity, std::uint64_t seed);

  [[nodiscard]] std::size_t size() const noexcept { return hosts_.size(); }
  [[nodiscard]] const Line& line(std::size_t host) const { return hosts_[host].line; }
  [[nodiscard]] const Counters& counters(std::size_t host) const { return hosts_[host].counters; }

  void set_line(std::size_t host, const Line& line);

  /// The host is reached under another address from now on; what its router remembered is void.
  ///
  /// \throws std::invalid_argument another host has it.
  void set_address(std::size_t host, Address address);

  /// Until then nothing passes the host's line, nor what is under way to it.
  void cut(std::size_t host, Time until);
  /// The same for what two hosts send each other.
  void cut(std::size_t host, std::size_t peer, Time until);

  /// A packet leaves a host. Times never go back.
  void send(std::size_t host, std::span<const std::byte> packet, Time now);

  /// Deliver all that has arrived by now, in the order of arrival.
  void advance(Time now, const Deliver& deliver);

  /// When advance() has something to do; nothing: not before the next send().
  [[nodiscard]] std::optional<Time> next() const;

 private:
  struct Host {
    Address address = 0;
    Line line;
    Lane up;
    Lane down;
    std::optional<FlowTable> router;
    Time cut_until{0};
    std::mt19937_64 random;
    Counters counters;
  };
  /// Of what one host sends another.
  struct Way {
    Time last_arrival{0};
    Time cut_until{0};
  };
  enum class Stage : std::uint8_t { kAtTheLine, kThrough };
  struct Event {
    Time at;
    std::uint64_t order;  // what happens at the same time happens in the order of sending
    PacketPool::Slot slot;
    std::uint16_t source;
    std::uint16_t destination;
    Stage stage;
  };
  struct Later {
    bool operator()(const Event& a, const Event& b) const {
      return a.at != b.at ? a.at > b.at : a.order > b.order;
    }
  };

  Way& way(std::size_t source, std::size_t destination) {
    return ways_[source * hosts_.size() + destination];
  }
  [[nodiscard]] bool is_cut(std::size_t host, std::size_t peer, Time now);
  void travel(std::size_t source, std::size_t destination, std::span<const std::byte> packet,
              Time departure);
  void schedule(Event event);
  void at_the_line(Event event);

  std::vector<Host> hosts_;
  std::vector<Way> ways_;
  std::unordered_map<Address, std::size_t> routes_;
  PacketPool pool_;
  std::vector<Event> events_;  // a heap
  std::uint64_t order_ = 0;
};

}  // namespace distro::emulator
