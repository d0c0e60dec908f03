#pragma once

#include <sys/types.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "transport/channel.h"
#include "transport/inbox.h"
#include "transport/io_service.h"
#include "transport/mesh.h"

namespace distro::transport {

/// A Channel over ZeroMQ: the callers' half. Messages wait for the I/O thread in its queue of
/// tasks, and for callers in the Inbox.
class ZmqChannel final : public Channel {
 public:
  explicit ZmqChannel(const ChannelConfig& config);
  ~ZmqChannel() override;
  ZmqChannel(const ZmqChannel&) = delete;
  ZmqChannel& operator=(const ZmqChannel&) = delete;

  [[nodiscard]] PeerAddress address() const override { return parts_->own; }
  void connect(std::vector<PeerAddress> peers) override;
  void send(int peer, SharedBytes message) override;
  std::vector<int> multicast(std::span<const int> peers, const SharedBytes& message) override;
  Bytes receive(int peer, Deadline deadline) override;
  std::optional<Bytes> try_receive(int peer) override;
  std::optional<Arrival> receive_any(Deadline deadline) override;
  void wake() override;
  void abort(int culprit, std::string_view reason) override;
  [[nodiscard]] std::optional<PeerLost> lost() const override;
  void await_answers(Deadline until) noexcept override;
  [[nodiscard]] std::optional<PeerError> suspect(Deadline until) const override;
  [[nodiscard]] std::string trouble(int peer) const override { return parts_->inbox.trouble(peer); }
  void set_timeout(std::chrono::milliseconds timeout) override;
  [[nodiscard]] ChannelCounters counters() const override;
  void close(Deadline deadline) noexcept override;

 private:
  // What the I/O thread may use, at a fixed address; leaked in a forked child.
  struct Parts {
    explicit Parts(const ChannelConfig& c)
        : config(with_window(c)), inbox(c.rank, c.world_size, c.inbox_bytes) {
      for (int peer = 0; peer < c.world_size; ++peer) {
        outstanding.push_back(std::make_shared<std::atomic<std::size_t>>(0));
      }
    }
    const ChannelConfig config;
    PeerAddress own;
    Inbox inbox;
    std::vector<std::shared_ptr<std::atomic<std::size_t>>> outstanding;  // bytes, by peer
    std::shared_ptr<IoService> service;
    std::unique_ptr<Mesh> mesh;  // I/O thread
  };

  void check_use(const char* what) const;
  void check_peer(const char* what, int peer) const;
  void check_send(int peer, const SharedBytes& message) const;
  SharedBytes count(int peer, SharedBytes message);
  Bytes unpack(int peer, Inbox::Taken taken);
  void shut(Deadline deadline, bool goodbye);

  /// In a forked child the sockets, the thread and its locks are the parent's.
  [[nodiscard]] bool foreign() const noexcept;

  const pid_t owner_;
  std::unique_ptr<Parts> parts_;
  std::atomic<bool> connected_{false};
  std::atomic<bool> closed_{false};
};

}  // namespace distro::transport
