#include "integration/emulator/network.h"

#include <algorithm>
#include <stdexcept>

namespace distro::emulator {
namespace {

// How much longer the way of a packet is that later ones overtake. Less: at low rates none comes
// in between; more: TCP takes it for lost in any case.
constexpr Time kDetour = std::chrono::milliseconds(10);

Time milliseconds(double count) {
  return std::chrono::duration_cast<Time>(std::chrono::duration<double, std::milli>(count));
}

bool happens(std::mt19937_64& random, double probability) {
  return probability > 0 && std::uniform_real_distribution<>(0, 1)(random) < probability;
}

Time jitter(std::mt19937_64& random, const Line& line) {
  if (line.jitter_ms <= 0) {
    return Time(0);
  }
  return milliseconds(std::uniform_real_distribution<>(0, line.jitter_ms)(random));
}

}  // namespace

Network::Network(const std::vector<Address>& addresses, std::size_t capacity, std::uint64_t seed)
    : hosts_(addresses.size()), ways_(addresses.size() * addresses.size()), pool_(capacity) {
  if (addresses.size() > UINT16_MAX) {
    throw std::invalid_argument("more hosts than can be told apart");
  }
  for (std::size_t host = 0; host < hosts_.size(); ++host) {
    if (!routes_.emplace(addresses[host], host).second) {
      throw std::invalid_argument("two hosts have one address");
    }
    hosts_[host].address = addresses[host];
    std::seed_seq seeds{seed, std::uint64_t{host}};
    hosts_[host].random.seed(seeds);
  }
  events_.reserve(capacity);
}

void Network::set_line(std::size_t host, const Line& line) {
  Host& own = hosts_[host];
  const auto set = [&](Lane& lane, double mbit) {
    const double bytes_per_second = mbit * 1e6 / 8;
    lane.set(bytes_per_second,
             line.queue_bytes > 0 ? line.queue_bytes : line.queue_ms * 1e-3 * bytes_per_second);
  };
  set(own.up, line.up_mbit);
  set(own.down, line.down_mbit);
  if (!line.nat) {
    own.router.reset();
  } else if (!own.router) {
    own.router.emplace();
  }
  own.line = line;
}

void Network::set_address(std::size_t host, Address address) {
  const auto [route, is_new] = routes_.emplace(address, host);
  if (!is_new) {
    if (route->second == host) {
      return;
    }
    throw std::invalid_argument("another host has this address");
  }
  routes_.erase(hosts_[host].address);
  hosts_[host].address = address;
  if (hosts_[host].router) {
    hosts_[host].router.emplace();
  }
}

void Network::cut(std::size_t host, Time until) { hosts_[host].cut_until = until; }

void Network::cut(std::size_t host, std::size_t peer, Time until) {
  way(host, peer).cut_until = until;
  way(peer, host).cut_until = until;
}

bool Network::is_cut(std::size_t host, std::size_t peer, Time now) {
  return now < hosts_[host].cut_until || now < way(host, peer).cut_until;
}

void Network::send(std::size_t host, std::span<const std::byte> packet, Time now) {
  Host& own = hosts_[host];
  const auto flow = parse(packet);
  if (!flow) {
    ++own.counters.malformed;
    return;
  }
  const auto route = routes_.find(flow->destination);
  if (route == routes_.end() || flow->source != own.address) {
    ++own.counters.unroutable;
    return;
  }
  const std::size_t destination = route->second;
  if (own.router) {
    own.router->note(*flow, now);
  }
  if (is_cut(host, destination, now)) {
    ++own.counters.cut_up;
    return;
  }
  const auto departure = own.up.admit(packet.size(), now);
  if (!departure) {
    ++own.counters.dropped_up;
    return;
  }
  ++own.counters.sent_packets;
  own.counters.sent_bytes += packet.size();
  if (happens(own.random, own.line.loss)) {
    ++own.counters.lost_up;
    return;
  }
  travel(host, destination, packet, *departure);
  if (happens(own.random, own.line.duplicate)) {
    ++own.counters.duplicated;
    travel(host, destination, packet, *departure);
  }
}

void Network::travel(std::size_t source, std::size_t destination, std::span<const std::byte> packet,
                     Time departure) {
  Host& own = hosts_[source];
  const Line& far = hosts_[destination].line;
  const auto slot = pool_.store(packet);
  if (!slot) {
    ++own.counters.dropped_up;
    return;
  }
  Time arrival = departure + milliseconds(own.line.delay_ms + far.delay_ms) +
                 jitter(own.random, own.line) + jitter(own.random, far);
  if (happens(own.random, own.line.reorder)) {
    ++own.counters.reordered;
    arrival += kDetour;
  } else {
    Time& last = way(source, destination).last_arrival;
    arrival = last = std::max(arrival, last);
  }
  schedule({arrival, order_++, *slot, static_cast<std::uint16_t>(source),
            static_cast<std::uint16_t>(destination), Stage::kAtTheLine});
}

void Network::schedule(Event event) {
  events_.push_back(event);
  std::push_heap(events_.begin(), events_.end(), Later());
}

std::optional<Time> Network::next() const {
  return events_.empty() ? std::nullopt : std::optional(events_.front().at);
}

void Network::advance(Time now, const Deliver& deliver) {
  while (!events_.empty() && events_.front().at <= now) {
    std::pop_heap(events_.begin(), events_.end(), Later());
    const Event event = events_.back();
    events_.pop_back();
    if (event.stage == Stage::kAtTheLine) {
      at_the_line(event);
      continue;
    }
    const auto packet = pool_.packet(event.slot);
    Counters& counters = hosts_[event.destination].counters;
    ++counters.received_packets;
    counters.received_bytes += packet.size();
    deliver(event.destination, packet);
    pool_.release(event.slot);
  }
}

void Network::at_the_line(Event event) {
  Host& host = hosts_[event.destination];
  const auto packet = pool_.packet(event.slot);
  const auto lost_to = [&](std::uint64_t& counter) {
    ++counter;
    pool_.release(event.slot);
  };
  // It may have been cut, or moved, since the packet was sent.
  const auto flow = parse(packet);
  if (!flow || flow->destination != host.address) {
    lost_to(host.counters.unroutable);
    return;
  }
  if (is_cut(event.destination, event.source, event.at)) {
    lost_to(host.counters.cut_down);
    return;
  }
  if (happens(host.random, host.line.loss)) {
    lost_to(host.counters.lost_down);
    return;
  }
  const auto through = host.down.admit(packet.size(), event.at);
  if (!through) {
    lost_to(host.counters.dropped_down);
    return;
  }
  // The router is in the house: what it refuses has used the line.
  if (host.router && !host.router->admits(*flow, event.at)) {
    lost_to(host.counters.refused);
    return;
  }
  event.at = *through;
  event.stage = Stage::kThrough;
  schedule(event);
}

}  // namespace distro::emulator
