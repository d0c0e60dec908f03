#include "tests/transport/proxy.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <stdexcept>
#include <thread>

namespace distro::transport::test {
namespace {

sockaddr_in loopback(unsigned short port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  return address;
}

// Blocking copy of what there is, which is also added to `copied`; false at the end of the stream.
bool copy(int from, int to, std::string& copied) {
  std::array<char, 65536> buffer{};
  const ssize_t count = ::recv(from, buffer.data(), buffer.size(), 0);
  if (count <= 0) {
    return false;
  }
  copied.append(buffer.data(), static_cast<std::size_t>(count));
  for (ssize_t done = 0; done < count;) {
    const ssize_t sent =
        ::send(to, buffer.data() + done, static_cast<std::size_t>(count - done), MSG_NOSIGNAL);
    if (sent <= 0) {
      return false;
    }
    done += sent;
  }
  return true;
}

}  // namespace

Proxy::Proxy(const std::string& target) : listener_(::socket(AF_INET, SOCK_STREAM, 0)) {
  aim_at(target);
  sockaddr_in address = loopback(0);
  socklen_t size = sizeof address;
  if (::bind(listener_, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      ::listen(listener_, 8) != 0 ||
      ::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    throw std::runtime_error("proxy: cannot listen");
  }
  port_ = ntohs(address.sin_port);
  thread_ = std::thread([this] { run(); });
}

Proxy::~Proxy() {
  stop_ = true;
  cut();
  thread_.join();
  ::close(listener_);
}

std::string Proxy::endpoint() const { return "tcp://127.0.0.1:" + std::to_string(port_); }

void Proxy::aim_at(const std::string& target) {
  target_port_ = static_cast<unsigned short>(std::stoi(target.substr(target.rfind(':') + 1)));
}

std::string Proxy::recorded() const {
  const std::lock_guard lock(mutex_);
  return recorded_;
}

void Proxy::run() {
  while (!stop_) {
    pollfd waiting{listener_, POLLIN, 0};
    if (::poll(&waiting, 1, 5) <= 0) {
      continue;
    }
    const int client = ::accept(listener_, nullptr, nullptr);
    if (!dead_) {
      const int server = ::socket(AF_INET, SOCK_STREAM, 0);
      const sockaddr_in address = loopback(target_port_);
      if (::connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) {
        relay(client, server, cuts_);
      }
      ::close(server);
    }
    ::close(client);
  }
}

// One connection at a time: each test has one pair of ranks behind its proxy.
void Proxy::relay(int client, int server, int generation) {
  while (cuts_ == generation) {
    if (holds_) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      continue;
    }
    std::array<pollfd, 2> ends{pollfd{client, POLLIN, 0}, pollfd{server, POLLIN, 0}};
    if (::poll(ends.data(), ends.size(), 2) <= 0) {
      continue;
    }
    std::string sent;
    std::string answered;
    const bool ended = (ends[0].revents != 0 && !copy(client, server, sent)) ||
                       (ends[1].revents != 0 && !copy(server, client, answered));
    {
      const std::lock_guard lock(mutex_);
      recorded_ += sent;
    }
    if (ended) {
      return;
    }
  }
}

}  // namespace distro::transport::test
