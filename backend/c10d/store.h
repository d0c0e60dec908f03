#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <string>

#include "backend/exchange/rendezvous.h"

namespace distro::c10d_backend {

/// torch's store as the exchange's rendezvous. Borrowed for the meeting only.
class C10dStore : public exchange::BlobStore {
 public:
  explicit C10dStore(c10::intrusive_ptr<c10d::Store> store) : store_(std::move(store)) {}
  void set(const std::string& key, const std::string& value) override;
  std::string get(const std::string& key) override;

 private:
  const c10::intrusive_ptr<c10d::Store> store_;
};

/// Address of this host on the way to a TCPStore's host (no packet is sent); empty for other
/// stores. A store on loopback gives a loopback address.
std::string route_to(const c10::intrusive_ptr<c10d::Store>& store);

}  // namespace distro::c10d_backend
