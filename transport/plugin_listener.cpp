#include "transport/plugin_listener.h"

#include <fmt/format.h>

#include <utility>

namespace distro::transport {
namespace {

// Events that are taken from the library before its frames and changes are worked on. Fewer: more
// rounds of the I/O thread; more: a flood takes more memory, and other channels wait.
constexpr int kMaxEvents = 64;

}  // namespace

PluginListener::PluginListener(const ChannelConfig& config)
    : RowListener(config.rank, config.world_size), plugin_(config) {}

void PluginListener::append_poll_items(std::vector<zmq::pollitem_t>& items, bool /*watch_space*/) {
  items.push_back({nullptr, plugin_.poll_fd(), ZMQ_POLLIN, 0});
}

bool PluginListener::receive(std::string& from, zmq::message_t& body) {
  for (int count = 0; count < kMaxEvents; ++count) {
    const auto event = plugin_.receive();
    if (!event) {
      return false;
    }
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
        if (sort(event->peer, event->data, from, body)) {
          return true;
        }
        break;
    }
  }
  return false;
}

SendResult PluginListener::give(int peer, zmq::message_t& body) {
  return plugin_.send(peer, {body.data<std::byte>(), body.size()});
}

std::optional<Listener::Lost> PluginListener::take_lost() {
  if (lost_.empty()) {
    return std::nullopt;
  }
  Lost first = std::move(lost_.front());
  lost_.pop_front();
  return first;
}

}  // namespace distro::transport
