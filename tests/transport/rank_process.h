#pragma once

#include <sys/types.h>

#include <functional>
#include <vector>

#include "transport/channel.h"

namespace distro::transport::test {

/// One rank in a child process, for tests that kill it. To be made before this process has any
/// channel.
class RankProcess {
 public:
  using Body = std::function<void(Channel& channel)>;

  /// The child opens its channel; it connects once it is told all addresses, runs the body and
  /// exits without closing.
  RankProcess(const ChannelConfig& config, const Body& body);
  ~RankProcess();
  RankProcess(const RankProcess&) = delete;
  RankProcess& operator=(const RankProcess&) = delete;

  [[nodiscard]] const PeerAddress& address() const { return address_; }
  [[nodiscard]] pid_t pid() const { return pid_; }
  void connect(const std::vector<PeerAddress>& addresses) const;
  void kill() const;

 private:
  pid_t pid_ = 0;
  int from_child_ = -1;
  int to_child_ = -1;
  PeerAddress address_;
};

}  // namespace distro::transport::test
