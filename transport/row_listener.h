#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>
#include <zmq.hpp>

#include "transport/link.h"

namespace distro::transport {

/// A listener whose carrier tells of all peers in one row: it sorts frames and changes of
/// connections by peer. The links that it makes refer to it. I/O thread.
class RowListener : public Listener {
 public:
  RowListener(int rank, int world_size)
      : rank_(rank), ways_(static_cast<std::size_t>(world_size)) {}

  std::unique_ptr<Link> dial(int peer, const std::string& endpoint) override;
  SendResult send(const std::string& route, zmq::message_t& body) override;
  bool take_disconnects() override { return std::exchange(disconnects_, false); }

 protected:
  /// Hand a frame for a peer that is up to the carrier.
  virtual SendResult give(int peer, zmq::message_t& body) = 0;

  /// What a link is woken by, beside what the listener is.
  virtual void append_link_items(std::vector<zmq::pollitem_t>& /*items*/, bool /*watch_space*/) {}

  [[nodiscard]] bool is_up(int peer) const { return way(peer).up; }
  void went_up(int peer);
  void went_down(int peer);

  /// A frame of a peer: true if it is for receive(), with the route that it came by.
  bool sort(int peer, std::span<const std::byte> frame, std::string& route, zmq::message_t& body);

  [[nodiscard]] static int peer_of(const std::string& route);

 private:
  class RowLink;

  struct Way {
    bool up = false;
    std::uint64_t connection = 0;  // counts up: each has a route of its own
    bool linked = false;           // a link takes the rest
    std::deque<Link::Change> changes;
    std::deque<zmq::message_t> frames;
  };

  [[nodiscard]] Way& way(int peer) { return ways_[static_cast<std::size_t>(peer)]; }
  [[nodiscard]] const Way& way(int peer) const { return ways_[static_cast<std::size_t>(peer)]; }
  [[nodiscard]] std::string route(int peer) const;

  const int rank_;
  std::vector<Way> ways_;  // by rank
  bool disconnects_ = false;
};

}  // namespace distro::transport
