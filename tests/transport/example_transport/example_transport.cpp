// An example of a third-party transport: ranks of one host, over Unix sockets that keep the limits
// of messages (SOCK_SEQPACKET). Built as a library of its own, against transport/abi.h alone.
//
// The higher rank dials the lower one, and says its group and rank in its first message. All
// sockets are in one epoll instance, which is the channel's descriptor.

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "transport/abi.h"

namespace {

struct Hello {
  std::uint64_t group;
  std::int32_t rank;
  std::int32_t zero;
};

class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  ~Fd() { reset(); }
  Fd(Fd&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  int get() const { return fd_; }
  void reset() {
    if (fd_ >= 0) {
      ::close(fd_);
    }
    fd_ = -1;
  }

 private:
  int fd_;
};

constexpr int kSocket = SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC;

// Names in the abstract namespace leave no files behind.
socklen_t name_to_address(const std::string& name, sockaddr_un& address) {
  address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

}  // namespace

// The abstract namespace is open to all users of the host, so a stranger can connect: torch-distro
// refuses whoever does not know the session numbers that the ranks published.
struct distro_transport_channel {
  explicit distro_transport_channel(const distro_transport_config& config)
      : rank(config.rank),
        world_size(config.world_size),
        group(config.group),
        buffer(config.max_frame_bytes + 1),
        peers(static_cast<std::size_t>(config.world_size)) {}

  struct Pending {
    int kind;
    int peer;
  };

  void watch(const Fd& fd, std::uint32_t events, int operation = EPOLL_CTL_ADD) const {
    epoll_event event{};
    event.events = events;
    event.data.fd = fd.get();
    ::epoll_ctl(epoll.get(), operation, fd.get(), &event);
  }
  void tell(int kind, int peer) {
    pending.push_back({kind, peer});
    ::eventfd_write(wake.get(), 1);
  }
  Fd& peer(int rank_of_peer) { return peers[static_cast<std::size_t>(rank_of_peer)]; }
  int peer_of(int fd) const {
    for (std::size_t i = 0; i < peers.size(); ++i) {
      if (peers[i].get() == fd) {
        return static_cast<int>(i);
      }
    }
    return -1;
  }
  void drop(int rank_of_peer) {
    peer(rank_of_peer).reset();
    tell(DISTRO_TRANSPORT_DOWN, rank_of_peer);
  }
  // The first message of a connection that was accepted: who it is.
  void welcome(int fd) {
    Hello hello{};
    const ssize_t size = ::recv(fd, &hello, sizeof hello, 0);
    if (size < 0 && errno == EAGAIN) {
      return;
    }
    Fd stranger = std::move(strangers.at(fd));
    strangers.erase(fd);
    if (size == sizeof hello && hello.group == group && hello.rank > rank &&
        hello.rank < world_size) {
      peer(hello.rank) = std::move(stranger);
      tell(DISTRO_TRANSPORT_UP, hello.rank);
    }
  }

  int rank;
  int world_size;
  std::uint64_t group;
  std::string name;
  std::vector<std::byte> buffer;
  Fd epoll, wake, listener;
  std::vector<Fd> peers;        // by rank
  std::map<int, Fd> strangers;  // accepted, not yet named
  std::deque<Pending> pending;
  distro_transport_counters counted{sizeof(distro_transport_counters), 0, 0};
};

namespace {

std::int32_t fail(distro_transport_error* error, const char* what) {
  std::snprintf(error->text, sizeof error->text, "%s: %s", what, std::strerror(errno));
  return DISTRO_TRANSPORT_ERROR;
}

std::int32_t open_channel(const distro_transport_config* config, distro_transport_channel** result,
                          distro_transport_error* error) try {
  auto channel = std::make_unique<distro_transport_channel>(*config);
  channel->epoll = Fd(::epoll_create1(EPOLL_CLOEXEC));
  channel->wake = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  channel->listener = Fd(::socket(AF_UNIX, kSocket, 0));
  std::uint64_t random = 0;
  if (channel->epoll.get() < 0 || channel->wake.get() < 0 || channel->listener.get() < 0 ||
      ::getrandom(&random, sizeof random, 0) != sizeof random) {
    return fail(error, "cannot make sockets (see `ulimit -n`)");
  }
  char name[64];
  std::snprintf(name, sizeof name, "distro-example-%016llx",
                static_cast<unsigned long long>(random));
  channel->name = name;
  sockaddr_un address;
  const socklen_t length = name_to_address(channel->name, address);
  if (::bind(channel->listener.get(), reinterpret_cast<sockaddr*>(&address), length) != 0 ||
      ::listen(channel->listener.get(), SOMAXCONN) != 0) {
    return fail(error, "cannot listen");
  }
  channel->watch(channel->wake, EPOLLIN);
  channel->watch(channel->listener, EPOLLIN);
  *result = channel.release();
  return DISTRO_TRANSPORT_OK;
} catch (const std::bad_alloc&) {
  errno = ENOMEM;
  return fail(error, "open");
}

const char* address(distro_transport_channel* channel) { return channel->name.c_str(); }

std::int32_t poll_fd(distro_transport_channel* channel) { return channel->epoll.get(); }

std::int32_t connect_all(distro_transport_channel* channel, const char* const* addresses,
                         distro_transport_error* error) {
  for (int peer = 0; peer < channel->rank; ++peer) {
    const std::string name = addresses[peer];
    sockaddr_un address;
    if (name.size() > sizeof address.sun_path - 1) {
      errno = EINVAL;
      return fail(error, "an address of another transport");
    }
    const socklen_t length = name_to_address(name, address);
    Fd fd(::socket(AF_UNIX, kSocket, 0));
    const Hello hello{channel->group, channel->rank, 0};
    // A Unix socket is connected at once, or the other end is gone: torch-distro looks after its
    // process, so there is nothing to try again.
    if (::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), length) != 0 ||
        ::send(fd.get(), &hello, sizeof hello, MSG_NOSIGNAL) != sizeof hello) {
      continue;
    }
    channel->watch(fd, EPOLLIN);
    channel->peer(peer) = std::move(fd);
    channel->tell(DISTRO_TRANSPORT_UP, peer);
  }
  return DISTRO_TRANSPORT_OK;
}

std::int32_t send_frame(distro_transport_channel* channel, std::int32_t peer, const void* data,
                        std::size_t size, distro_transport_error* error) {
  const Fd& fd = channel->peer(peer);
  if (fd.get() < 0) {
    return DISTRO_TRANSPORT_GONE;
  }
  if (::send(fd.get(), data, size, MSG_NOSIGNAL) >= 0) {
    channel->counted.bytes_sent += size;
    return DISTRO_TRANSPORT_OK;
  }
  if (errno == EAGAIN || errno == ENOBUFS) {
    channel->watch(fd, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
    return DISTRO_TRANSPORT_AGAIN;
  }
  // A broken connection is told by DOWN once what has arrived over it was read.
  return errno == EPIPE || errno == ECONNRESET ? DISTRO_TRANSPORT_GONE : fail(error, "send");
}

// One event of the sockets. AGAIN: there was nothing, or nothing to tell.
std::int32_t handle(distro_transport_channel* channel, const epoll_event& found,
                    distro_transport_event* event) {
  const int fd = found.data.fd;
  if (fd == channel->listener.get()) {
    Fd accepted(::accept4(fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (accepted.get() >= 0) {
      channel->watch(accepted, EPOLLIN);
      channel->strangers.emplace(accepted.get(), std::move(accepted));
    }
    return DISTRO_TRANSPORT_AGAIN;
  }
  if (fd == channel->wake.get()) {
    return DISTRO_TRANSPORT_AGAIN;
  }
  const int peer = channel->peer_of(fd);
  if (peer < 0) {
    channel->welcome(fd);
    return DISTRO_TRANSPORT_AGAIN;
  }
  if ((found.events & EPOLLOUT) != 0) {
    channel->watch(channel->peer(peer), EPOLLIN, EPOLL_CTL_MOD);
    channel->tell(DISTRO_TRANSPORT_SPACE, peer);
  }
  const ssize_t size = ::recv(fd, channel->buffer.data(), channel->buffer.size(), 0);
  if (size < 0 && errno == EAGAIN) {
    return DISTRO_TRANSPORT_AGAIN;
  }
  if (size <= 0 || static_cast<std::size_t>(size) == channel->buffer.size()) {
    channel->drop(peer);
    return DISTRO_TRANSPORT_AGAIN;
  }
  channel->counted.bytes_received += static_cast<std::uint64_t>(size);
  event->kind = DISTRO_TRANSPORT_FRAME;
  event->peer = peer;
  event->data = channel->buffer.data();
  event->size = static_cast<std::size_t>(size);
  return DISTRO_TRANSPORT_OK;
}

std::int32_t receive(distro_transport_channel* channel, distro_transport_event* event,
                     distro_transport_error* error) try {
  for (;;) {
    if (!channel->pending.empty()) {
      event->kind = channel->pending.front().kind;
      event->peer = channel->pending.front().peer;
      channel->pending.pop_front();
      return DISTRO_TRANSPORT_OK;
    }
    eventfd_t ignored = 0;
    ::eventfd_read(channel->wake.get(), &ignored);
    epoll_event found{};
    const int count = ::epoll_wait(channel->epoll.get(), &found, 1, 0);
    if (count < 0 && errno != EINTR) {
      return fail(error, "epoll_wait");
    }
    if (count <= 0) {
      return DISTRO_TRANSPORT_AGAIN;
    }
    if (handle(channel, found, event) == DISTRO_TRANSPORT_OK) {
      return DISTRO_TRANSPORT_OK;
    }
  }
} catch (const std::bad_alloc&) {
  errno = ENOMEM;
  return fail(error, "receive");
}

// The kernel delivers what was sent.
void close_channel(distro_transport_channel* channel, std::int64_t /*linger_ms*/) {
  delete channel;
}

void counters(distro_transport_channel* channel, distro_transport_counters* result) {
  result->bytes_sent = channel->counted.bytes_sent;
  result->bytes_received = channel->counted.bytes_received;
}

constexpr distro_transport kTransport = {DISTRO_TRANSPORT_ABI,
                                         0,
                                         sizeof(distro_transport),
                                         "example",
                                         "1.0",
                                         open_channel,
                                         address,
                                         poll_fd,
                                         connect_all,
                                         send_frame,
                                         receive,
                                         close_channel,
                                         counters};

}  // namespace

const distro_transport* distro_transport_plugin(std::uint32_t host_abi) {
  return host_abi == DISTRO_TRANSPORT_ABI ? &kTransport : nullptr;
}
