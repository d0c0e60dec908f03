#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>
#include <zmq.hpp>

#include "transport/dialer.h"
#include "transport/pacer.h"
#include "transport/relay_frame.h"
#include "transport/row_listener.h"

namespace distro::transport {

/// One connection to a relay in the place of those to all peers. Frames that are the same for
/// several peers leave once. The relay tells who is there, and vouches for who sent what; what it
/// loses, a restart of its own included, the sessions send again. I/O thread.
class HubListener final : public RowListener {
 public:
  /// `pacer` outlives it.
  HubListener(zmq::context_t& context, const ChannelConfig& config, Pacer& pacer);
  ~HubListener() override;
  HubListener(const HubListener&) = delete;
  HubListener& operator=(const HubListener&) = delete;

  [[nodiscard]] const std::string& endpoint() const noexcept override { return config_.relay; }
  void connect(const std::vector<PeerAddress>& addresses) override;
  void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) override;
  bool receive(std::string& route, zmq::message_t& body) override;
  /// As the relay says, which has looked at the key where there are some.
  [[nodiscard]] std::optional<int> authenticated(const std::string& route,
                                                 const zmq::message_t& body) const override;
  Deadline flush(Deadline now) override;
  [[nodiscard]] bool flushed() const noexcept override { return outgoing_.empty(); }
  [[nodiscard]] std::optional<Carried> carried() override { return carried_; }
  std::uint64_t take_rejected() override { return dialer_ ? dialer_->take_rejected() : 0; }
  [[nodiscard]] std::string trouble(int peer, Deadline now) const override;

 private:
  // A frame that waits for the relay's connection, and for whom.
  struct Outgoing {
    std::uint64_t order = 0;
    zmq::message_t frame;
    std::vector<std::uint16_t> members;
  };

  [[nodiscard]] std::uint16_t member(int rank) const;
  [[nodiscard]] int rank_of_member(std::uint32_t member) const;  // -1: none, or this rank
  void all_down();
  void on_changes(Deadline now);
  // True if it is a frame of a higher rank, for receive().
  bool take(zmq::message_t& message, std::string& from, zmq::message_t& body);
  SendResult give(int peer, zmq::message_t& body) override;
  bool hand_over(zmq::message_t& message);

  const ChannelConfig& config_;
  zmq::context_t& context_;
  Pacer& pacer_;
  std::unordered_map<std::uint32_t, int> ranks_;  // by member
  std::optional<Dialer> dialer_;                  // after connect
  bool open_ = false;                             // the connection
  bool joined_ = false;
  Deadline join_at_ = Deadline::max();  // when to say JOIN (again)
  Deadline away_since_{};               // not joined
  std::string refusal_;
  bool accepting_ = true;  // false: what was queued before goes first
  std::vector<Outgoing> outgoing_;
  std::size_t numbered_ = 0;  // of outgoing_: frames with a number
  std::size_t sent_ = 0;      // of outgoing_
  std::unordered_multimap<std::uint64_t, std::size_t> by_check_;  // frame's check to its index
  Carried carried_{};
};

}  // namespace distro::transport
