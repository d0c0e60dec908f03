#include "transport/split_listener.h"

#include <algorithm>

namespace distro::transport {
namespace {

// The first character of a route says whose it is; the rest is that listener's own.
constexpr char kNear = 'n';
constexpr char kFar = 'f';

std::string own_part(const std::string& route) { return route.substr(1); }

}  // namespace

Listener& SplitListener::way_to(int peer) const { return is_near(config_, peer) ? *near_ : *far_; }

void SplitListener::connect(const std::vector<PeerAddress>& addresses) {
  near_->connect(addresses);
  far_->connect(addresses);
}

std::unique_ptr<Link> SplitListener::dial(int peer, const std::string& endpoint) {
  return way_to(peer).dial(peer, endpoint);
}

void SplitListener::append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) {
  near_->append_poll_items(items, watch_space);
  far_->append_poll_items(items, watch_space);
}

bool SplitListener::receive(std::string& route, zmq::message_t& body) {
  received_near_ = near_->receive(route, body);
  if (received_near_) {
    route.insert(route.begin(), kNear);
    return true;
  }
  if (far_->receive(route, body)) {
    route.insert(route.begin(), kFar);
    return true;
  }
  return false;
}

SendResult SplitListener::send(const std::string& route, zmq::message_t& body) {
  return (route.front() == kNear ? *near_ : *far_).send(own_part(route), body);
}

bool SplitListener::take_disconnects() {
  const bool near = near_->take_disconnects();
  return far_->take_disconnects() || near;
}

std::optional<Listener::Lost> SplitListener::take_lost() {
  auto lost = near_->take_lost();
  return lost ? lost : far_->take_lost();
}

std::optional<int> SplitListener::authenticated(const std::string& route,
                                                const zmq::message_t& body) const {
  return (route.front() == kNear ? *near_ : *far_).authenticated(own_part(route), body);
}

std::string SplitListener::trouble(int peer, Deadline now) const {
  return way_to(peer).trouble(peer, now);
}

}  // namespace distro::transport
