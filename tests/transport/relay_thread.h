#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "transport/relay.h"

namespace distro::transport::test {

/// A relay on loopback, with a thread of its own, that can be stopped and begun again on the same
/// port.
class RelayThread {
 public:
  explicit RelayThread(RelayConfig config = {}) : config_(std::move(config)) {
    config_.keepalive = std::chrono::milliseconds(500);
    start();
  }
  ~RelayThread() { stop(); }
  RelayThread(const RelayThread&) = delete;
  RelayThread& operator=(const RelayThread&) = delete;

  void start() {
    relay_ = std::make_unique<Relay>(config_);
    endpoint_ = relay_->endpoint();
    config_.port =
        static_cast<std::uint16_t>(std::stoi(endpoint_.substr(endpoint_.rfind(':') + 1)));
    stop_ = false;
    thread_ = std::thread([this] { relay_->run(stop_); });
  }
  void stop() {
    stop_ = true;
    if (thread_.joinable()) {
      thread_.join();
    }
    relay_.reset();
  }

  [[nodiscard]] const std::string& endpoint() const { return endpoint_; }
  [[nodiscard]] RelayCounters counters() const { return relay_->counters(); }

 private:
  RelayConfig config_;
  std::string endpoint_;
  std::unique_ptr<Relay> relay_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace distro::transport::test
