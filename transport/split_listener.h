#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>
#include <zmq.hpp>

#include "transport/link.h"

namespace distro::transport {

/// Two ways: ranks of the own site directly, all others by a relay. I/O thread.
class SplitListener final : public Listener {
 public:
  /// `config.near` tells who is reached by `near`.
  SplitListener(const ChannelConfig& config, std::unique_ptr<Listener> near,
                std::unique_ptr<Listener> far)
      : config_(config), near_(std::move(near)), far_(std::move(far)) {}

  /// Where those of the own site connect to.
  [[nodiscard]] const std::string& endpoint() const noexcept override { return near_->endpoint(); }
  void connect(const std::vector<PeerAddress>& addresses) override;
  std::unique_ptr<Link> dial(int peer, const std::string& endpoint) override;
  void append_poll_items(std::vector<zmq::pollitem_t>& items, bool watch_space) override;
  bool receive(std::string& route, zmq::message_t& body) override;
  SendResult send(const std::string& route, zmq::message_t& body) override;
  bool take_disconnects() override;
  std::optional<Lost> take_lost() override;
  [[nodiscard]] std::optional<int> authenticated(const std::string& route,
                                                 const zmq::message_t& body) const override;
  Deadline flush(Deadline now) override { return far_->flush(now); }
  [[nodiscard]] bool flushed() const noexcept override { return far_->flushed(); }
  [[nodiscard]] std::optional<Carried> carried() override { return far_->carried(); }
  std::uint64_t take_rejected() override { return near_->take_rejected() + far_->take_rejected(); }
  [[nodiscard]] std::string refusal() const override { return near_->refusal(); }
  void append_early_items(std::vector<zmq::pollitem_t>& items) override {
    near_->append_early_items(items);
  }
  void sort_early() override { near_->sort_early(); }
  void recognise() override { (received_near_ ? *near_ : *far_).recognise(); }
  [[nodiscard]] std::string trouble(int peer, Deadline now) const override;

 private:
  [[nodiscard]] Listener& way_to(int peer) const;

  const ChannelConfig& config_;
  const std::unique_ptr<Listener> near_;
  const std::unique_ptr<Listener> far_;
  bool received_near_ = false;  // the last frame
};

}  // namespace distro::transport
