#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>
#include <zmq.hpp>

#include "transport/channel.h"
#include "transport/link.h"
#include "transport/socket_options.h"

namespace distro::transport {

/// The DEALER that dials one lower rank. ZeroMQ retries until the first connection; each connection
/// after that gets a fresh socket, since a socket that reconnects by itself would send what was
/// queued for the old connection, and one that ZeroMQ has given up (a frame above MAXMSGSIZE, a
/// failed handshake) never retries. I/O thread.
class Dialer final : public Link {
 public:
  /// `peer`: its rank, or kRelay.
  Dialer(zmq::context_t& context, const ChannelConfig& config, int peer, std::string endpoint);
  static constexpr int kRelay = -1;

  ~Dialer() override;
  Dialer(const Dialer&) = delete;
  Dialer& operator=(const Dialer&) = delete;

  void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) override;
  /// inproc: one `opened` at the start, nothing else ever.
  Change next_change(Deadline now) override;
  void drained(Deadline now) override;
  bool receive(zmq::message_t& body) override;
  SendResult send(zmq::message_t& body) override;
  std::uint64_t take_rejected() override { return std::exchange(newly_rejected_, 0); }
  [[nodiscard]] std::string refusal() const override { return refusal_; }
  void forget() noexcept override { phase_ = Phase::waiting; }
  void linger_briefly() noexcept override { linger_ = kLingerAfterGoodbye; }
  void work(Deadline now) override;
  [[nodiscard]] Deadline next_timer() const noexcept override { return at_; }

 private:
  enum class Phase {
    waiting,   // a fresh socket, to be connected at at_
    dialling,  // ZeroMQ tries
    open,
    doubtful,  // a try failed; if ZeroMQ does not say by at_ that it makes another, the socket is
               // dead
  };

  void renew(Deadline now);
  void on_handshake_failed(const SocketMonitor::Event& event);

  zmq::context_t& context_;
  const ChannelConfig& config_;
  [[nodiscard]] std::string name_of_peer() const;
  [[nodiscard]] const std::string& key_of_peer() const;

  const int peer_;
  std::string endpoint_;
  zmq::socket_t dealer_;
  std::optional<SocketMonitor> monitor_;
  Phase phase_ = Phase::waiting;
  Deadline at_ = Deadline::max();
  unsigned renewals_ = 0;  // since the connection was last open
  bool inproc_opened_ = false;
  std::uint64_t newly_rejected_ = 0;
  std::string refusal_;  // why the last handshake failed; empty after one that did not
  std::chrono::milliseconds linger_ = kLinger;
  std::minstd_rand jitter_;
};

}  // namespace distro::transport
