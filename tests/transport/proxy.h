#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <thread>

namespace distro::transport::test {

/// A relay of TCP connections on loopback that can break or hold them.
class Proxy {
 public:
  /// `target`: tcp://127.0.0.1:port
  explicit Proxy(const std::string& target);
  ~Proxy();
  Proxy(const Proxy&) = delete;
  Proxy& operator=(const Proxy&) = delete;

  [[nodiscard]] std::string endpoint() const;
  /// Break the connections that stand; new ones are relayed again.
  void cut() { ++cuts_; }
  /// Nothing passes while it holds, and nobody is told; what is sent meanwhile comes afterwards.
  void hold(bool holds) { holds_ = holds; }
  /// Where new connections go from now on: tcp://127.0.0.1:port
  void aim_at(const std::string& target);
  /// What the ends that dial have sent so far.
  [[nodiscard]] std::string recorded() const;
  /// Break them, and accept none any more.
  void cut_for_good() {
    dead_ = true;
    cut();
  }

 private:
  void run();
  void relay(int client, int server, int generation);

  int listener_ = -1;
  unsigned short port_ = 0;
  std::atomic<unsigned short> target_port_{0};
  mutable std::mutex mutex_;
  std::string recorded_;  // guarded by mutex_
  std::atomic<int> cuts_{0};
  std::atomic<bool> dead_{false};
  std::atomic<bool> holds_{false};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace distro::transport::test
