#include "transport/plugin_listener.h"

#include <fmt/format.h>

#include <charconv>
#include <utility>

namespace distro::transport {
namespace {

// Events that are taken from the library before its frames and changes are worked on. Fewer: more
// rounds of the I/O thread; more: a flood takes more memory, and other channels wait.
constexpr int kMaxEvents = 64;

}  // namespace

class PluginListener::PluginLink final : public Link {
 public:
  PluginLink(PluginListener& owner, int peer) : owner_(owner), peer_(peer) {
    owner_.way(peer).linked = true;
  }
  ~PluginLink() override {
    Way& way = owner_.way(peer_);
    way.linked = false;
    way.changes.clear();
    way.frames.clear();
  }
  PluginLink(const PluginLink&) = delete;
  PluginLink& operator=(const PluginLink&) = delete;

  // The library's descriptor once more: Mesh asks each link for its own events.
  void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) override {
    owner_.append_poll_items(items, watch_space);
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
    if (!owner_.way(peer_).up) {
      return SendResult::sent;
    }
    const SendResult result = owner_.plugin_.send(peer_, {body.data<std::byte>(), body.size()});
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
  PluginListener& owner_;
  const int peer_;
};

PluginListener::PluginListener(const ChannelConfig& config)
    : rank_(config.rank), plugin_(config), ways_(static_cast<std::size_t>(config.world_size)) {}

std::unique_ptr<Link> PluginListener::dial(int peer, const std::string& /*endpoint*/) {
  return std::make_unique<PluginLink>(*this, peer);
}

void PluginListener::append_poll_items(std::vector<zmq::pollitem_t>& items, bool /*watch_space*/) {
  items.push_back({nullptr, plugin_.poll_fd(), ZMQ_POLLIN, 0});
}

std::string PluginListener::route(int peer) {
  return fmt::format("{}/{}", peer, way(peer).connection);
}

void PluginListener::went_down(int peer) {
  Way& to = way(peer);
  if (!std::exchange(to.up, false)) {
    return;
  }
  if (to.linked) {
    to.changes.push_back(Link::Change::broke);
  }
  disconnects_ = disconnects_ || peer > rank_;
}

void PluginListener::went_up(int peer) {
  went_down(peer);
  Way& to = way(peer);
  to.up = true;
  ++to.connection;
  if (to.linked) {
    to.changes.push_back(Link::Change::opened);
  }
}

bool PluginListener::receive(std::string& from, zmq::message_t& body) {
  for (int count = 0; count < kMaxEvents; ++count) {
    const auto event = plugin_.receive();
    if (!event) {
      return false;
    }
    Way& to = way(event->peer);
    switch (event->kind) {
      case DISTRO_TRANSPORT_UP:
        went_up(event->peer);
        break;
      case DISTRO_TRANSPORT_DOWN:
        went_down(event->peer);
        break;
      case DISTRO_TRANSPORT_LOST:
        went_down(event->peer);
        lost_.push_back(
            {event->peer, fmt::format("the transport says that rank {} is lost: {}", event->peer,
                                      event->text.empty() ? "no reason" : event->text)});
        break;
      case DISTRO_TRANSPORT_SPACE:
        break;  // being woken is enough
      case DISTRO_TRANSPORT_FRAME:
        if (event->peer > rank_) {
          from = route(event->peer);
          body.rebuild(event->data.data(), event->data.size());
          return true;
        }
        if (to.linked) {
          to.frames.emplace_back(event->data.data(), event->data.size());
        }
        break;
    }
  }
  return false;
}

SendResult PluginListener::send(const std::string& to, zmq::message_t& body) {
  int peer = -1;
  std::from_chars(to.data(), to.data() + to.size(), peer);
  if (!way(peer).up || to != route(peer)) {
    return SendResult::gone;
  }
  return plugin_.send(peer, {body.data<std::byte>(), body.size()});
}

bool PluginListener::take_disconnects() { return std::exchange(disconnects_, false); }

std::optional<Listener::Lost> PluginListener::take_lost() {
  if (lost_.empty()) {
    return std::nullopt;
  }
  Lost first = std::move(lost_.front());
  lost_.pop_front();
  return first;
}

}  // namespace distro::transport
