#include "backend/exchange/post.h"

#include <algorithm>
#include <iterator>

#include "backend/exchange/counters.h"

namespace distro::exchange {

Post::Post(transport::Channel& channel, Counters& counters, const Sites& sites, int rank,
           bool uploads_once)
    : channel_(channel),
      counters_(counters),
      sites_(sites),
      rank_(rank),
      leader_(sites.leader_of(rank)),
      uploads_once_(uploads_once) {
  for (const int neighbour : sites.neighbours(rank)) {
    (is_near(neighbour) ? site_ : other_sites_).push_back(neighbour);
    if (passes_on(neighbour)) {
      bringing_.push_back(neighbour);
    }
  }
}

bool Post::is_near(int neighbour) const { return sites_.leader_of(neighbour) == leader_; }

int Post::way_to(int writer) const {
  if (rank_ != leader_) {
    return leader_;
  }
  return is_near(writer) ? writer : sites_.leader_of(writer);
}

bool Post::may_bring(int neighbour, const Envelope& envelope) const {
  const auto writer = static_cast<int>(envelope.origin);
  if (envelope.origin >= static_cast<std::uint32_t>(sites_.ranks()) || writer == rank_ ||
      way_to(writer) != neighbour) {
    return false;
  }
  switch (envelope.kind) {
    case MessageKind::step:
      return sites_.leads(writer);
    case MessageKind::check:
      return rank_ == leader_ && is_near(writer);
    default:
      return true;
  }
}

bool Post::passes_on(int writer) const {
  const auto site = sites_.site_of(rank_).size();
  return rank_ == leader_ &&
         (is_near(writer) ? site > 2 || (site > 1 && sites_.participants() > 1) : site > 1);
}

void Post::send(int neighbour, const transport::SharedBytes& message) const {
  try {
    channel_.send(neighbour, message);
  } catch (const transport::PeerLeft&) {
    // It has ended normally and needs no more from us. Whether we still need something from it
    // shows when we take it.
    return;
  }
  count(1, is_near(neighbour), *message);
}

void Post::multicast(const std::vector<int>& neighbours,
                     const transport::SharedBytes& message) const {
  if (neighbours.empty()) {
    return;
  }
  const std::size_t reached = neighbours.size() - channel_.multicast(neighbours, message).size();
  const bool near = is_near(neighbours.front());
  count(!near && uploads_once_ ? std::min<std::size_t>(reached, 1) : reached, near, *message);
}

void Post::spread(int writer, const transport::SharedBytes& message) const {
  std::vector<int> others;
  std::ranges::copy_if(site_, std::back_inserter(others),
                       [writer](int neighbour) { return neighbour != writer; });
  multicast(others, message);
  if (is_near(writer)) {
    multicast(other_sites_, message);
  }
}

void Post::count(std::size_t recipients, bool near, const transport::Bytes& message) const {
  auto& counter = near ? counters_.site_bytes : counters_.payload_bytes_sent;
  counter.fetch_add(recipients * message.size(), std::memory_order_relaxed);
}

}  // namespace distro::exchange
