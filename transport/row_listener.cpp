#include "transport/row_listener.h"

#include <fmt/format.h>

#include <charconv>

namespace distro::transport {

class RowListener::RowLink final : public Link {
 public:
  RowLink(RowListener& owner, int peer) : owner_(owner), peer_(peer) {
    Way& way = owner_.way(peer);
    way.linked = true;
    if (way.up) {
      way.changes.push_back(Change::opened);
    }
  }
  ~RowLink() override {
    Way& way = owner_.way(peer_);
    way.linked = false;
    way.changes.clear();
    way.frames.clear();
  }
  RowLink(const RowLink&) = delete;
  RowLink& operator=(const RowLink&) = delete;

  void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) override {
    owner_.append_link_items(items, watch_space);
  }
  Change next_change(Deadline /*now*/) override {
    auto& changes = owner_.way(peer_).changes;
    if (changes.empty()) {
      return Change::none;
    }
    const Change next = changes.front();
    changes.pop_front();
    return next;
  }
  void drained(Deadline /*now*/) override {}
  bool receive(zmq::message_t& body) override {
    auto& frames = owner_.way(peer_).frames;
    if (frames.empty()) {
      return false;
    }
    body = std::move(frames.front());
    frames.pop_front();
    return true;
  }
  SendResult send(zmq::message_t& body) override {
    // Without a connection the frame is lost, as it would be on one that breaks: the session sends
    // it again on the next.
    if (!owner_.is_up(peer_)) {
      return SendResult::sent;
    }
    const SendResult result = owner_.give(peer_, body);
    return result == SendResult::gone ? SendResult::sent : result;
  }
  [[nodiscard]] bool pending() const noexcept override {
    return !owner_.way(peer_).frames.empty() || !owner_.way(peer_).changes.empty();
  }
  void work(Deadline /*now*/) override {}
  [[nodiscard]] Deadline next_timer() const noexcept override {
    return pending() ? Deadline::min() : Deadline::max();
  }

 private:
  RowListener& owner_;
  const int peer_;
};

std::unique_ptr<Link> RowListener::dial(int peer, const std::string& /*endpoint*/) {
  return std::make_unique<RowLink>(*this, peer);
}

std::string RowListener::route(int peer) const {
  return fmt::format("{}/{}", peer, way(peer).connection);
}

int RowListener::peer_of(const std::string& route) {
  int peer = -1;
  std::from_chars(route.data(), route.data() + route.size(), peer);
  return peer;
}

void RowListener::went_down(int peer) {
  Way& to = way(peer);
  if (!std::exchange(to.up, false)) {
    return;
  }
  if (to.linked) {
    to.changes.push_back(Link::Change::broke);
  }
  disconnects_ = disconnects_ || peer > rank_;
}

void RowListener::went_up(int peer) {
  went_down(peer);
  Way& to = way(peer);
  to.up = true;
  ++to.connection;
  if (to.linked) {
    to.changes.push_back(Link::Change::opened);
  }
}

bool RowListener::sort(int peer, std::span<const std::byte> frame, std::string& from,
                       zmq::message_t& body) {
  if (peer > rank_) {
    from = route(peer);
    body.rebuild(frame.data(), frame.size());
    return true;
  }
  if (way(peer).linked) {
    way(peer).frames.emplace_back(frame.data(), frame.size());
  }
  return false;
}

SendResult RowListener::send(const std::string& to, zmq::message_t& body) {
  const int peer = peer_of(to);
  return is_up(peer) && to == route(peer) ? give(peer, body) : SendResult::gone;
}

}  // namespace distro::transport
