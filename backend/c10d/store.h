#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <string>

#include "backend/exchange/rendezvous.h"

namespace distro::c10d_backend {

/// torch's store as the exchange's rendezvous. Borrowed for the meeting only.
class C10dStore : public exchange::BlobStore {
 public:
  /// `timeout`: how long get() waits for a key, the group's time-out.
  C10dStore(c10::intrusive_ptr<c10d::Store> store, std::chrono::milliseconds timeout)
      : store_(std::move(store)), timeout_(timeout) {}
  void set(const std::string& key, const std::string& value) override;
  std::string get(const std::string& key) override;
  bool has(const std::string& key) override;

 private:
  const c10::intrusive_ptr<c10d::Store> store_;
  const std::chrono::milliseconds timeout_;
};

/// Address of this host on the way to a TCPStore's host (no packet is sent); empty for other
/// stores. A store on loopback gives a loopback address.
std::string route_to(const c10::intrusive_ptr<c10d::Store>& store);

}  // namespace distro::c10d_backend
