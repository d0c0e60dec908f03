#include "backend/c10d/store.h"

#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <memory>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

namespace distro::c10d_backend {
namespace {

struct CloseFile {
  int file;
  ~CloseFile() { ::close(file); }
};

// The local address that the kernel would send from to reach this one; empty if there is no route.
std::string source_address(const addrinfo& target) {
  const int file = ::socket(target.ai_family, SOCK_DGRAM, 0);
  if (file < 0) {
    return {};
  }
  const CloseFile guard{file};
  sockaddr_storage local{};
  socklen_t size = sizeof local;
  std::array<char, NI_MAXHOST> text{};
  // Connecting a datagram socket only looks up the route.
  if (::connect(file, target.ai_addr, target.ai_addrlen) != 0 ||
      ::getsockname(file, reinterpret_cast<sockaddr*>(&local), &size) != 0 ||
      ::getnameinfo(reinterpret_cast<const sockaddr*>(&local), size, text.data(), text.size(),
                    nullptr, 0, NI_NUMERICHOST) != 0) {
    return {};
  }
  return text.data();
}

}  // namespace

void C10dStore::set(const std::string& key, const std::string& value) {
  store_->set(key, std::vector<std::uint8_t>(value.begin(), value.end()));
}

std::string C10dStore::get(const std::string& key) {
  store_->wait({key}, timeout_);
  const auto value = store_->get(key);
  return {value.begin(), value.end()};
}

bool C10dStore::has(const std::string& key) { return store_->check({key}); }

std::string route_to(const c10::intrusive_ptr<c10d::Store>& store) {
  auto inner = store;
  while (const auto prefix = c10::dynamic_intrusive_pointer_cast<c10d::PrefixStore>(inner)) {
    inner = prefix->getUnderlyingStore();
  }
  const auto tcp = c10::dynamic_intrusive_pointer_cast<c10d::TCPStore>(inner);
  if (!tcp) {
    return {};
  }
  addrinfo hints{};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(tcp->getHost().c_str(), "1", &hints, &found) != 0) {
    return {};
  }
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> guard(found, &::freeaddrinfo);
  for (const addrinfo* target = found; target != nullptr; target = target->ai_next) {
    if (auto address = source_address(*target); !address.empty()) {
      return address;
    }
  }
  return {};
}

}  // namespace distro::c10d_backend
