#include "transport/io_service.h"

#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <exception>
#include <system_error>
#include <utility>

#include "transport/log.h"
#include "transport/zap.h"

namespace distro::transport {
namespace {

// Sockets of a process: two a peer and group. Fewer: several groups of 256 ranks cannot be opened;
// more: a table of pointers grows.
constexpr int kMaxSockets = 16384;

// A bound on one wait, against clock arithmetic that overflows; nothing depends on it.
constexpr auto kLongestPoll = std::chrono::seconds(60);

class EventFd {
 public:
  EventFd() : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (fd_ < 0) {
      throw std::system_error(errno, std::generic_category(), "eventfd for the I/O thread");
    }
  }
  ~EventFd() { ::close(fd_); }
  EventFd(const EventFd&) = delete;
  EventFd& operator=(const EventFd&) = delete;

  [[nodiscard]] int get() const noexcept { return fd_; }
  void signal() const noexcept { ::eventfd_write(fd_, 1); }
  void clear() const noexcept {
    eventfd_t ignored = 0;
    ::eventfd_read(fd_, &ignored);
  }

 private:
  int fd_;
};

// The lock is held across fork, so that a child never inherits it locked.
struct Registry {
  std::mutex mutex;
  std::weak_ptr<IoService> service;
  // Never used: as long as a context is there, ZeroMQ does not take down libpgm, whose
  // initialisation would race with it where one thread closes the last channel and another opens
  // the next.
  zmq::context_t keeper;
};

Registry& registry() {
  // Leaked on purpose: channels that static objects own are closed while the process exits.
  static Registry& instance = *std::make_unique<Registry>().release();
  static const int registered =
      ::pthread_atfork([] { instance.mutex.lock(); }, [] { instance.mutex.unlock(); },
                       [] {
                         instance.service.reset();
                         instance.mutex.unlock();
                       });
  (void)registered;
  return instance;
}

// Signals are for the user's threads: Python expects SIGINT in its main one.
class BlockSignals {
 public:
  BlockSignals() {
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockSignals() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  BlockSignals(const BlockSignals&) = delete;
  BlockSignals& operator=(const BlockSignals&) = delete;

 private:
  sigset_t before_{};
};

long poll_milliseconds(Deadline wake) {
  const auto now = Clock::now();
  if (wake <= now) {
    return 0;
  }
  const auto wait = std::min<Clock::duration>(wake - now, kLongestPoll);
  return static_cast<long>(std::chrono::ceil<std::chrono::milliseconds>(wait).count());
}

}  // namespace

struct IoService::State {
  zmq::context_t context;
  EventFd wake;
  std::mutex mutex;
  std::vector<std::function<void()>> tasks;  // guarded by mutex
  bool stop = false;                         // guarded by mutex
  std::vector<IoHandler*> handlers;          // I/O thread only
  Pacer pacer;                               // I/O thread only
  std::unique_ptr<ZapHandler> zap;           // I/O thread only
  std::thread thread;
};

std::shared_ptr<IoService> IoService::acquire() {
  Registry& known = registry();
  const std::lock_guard lock(known.mutex);
  auto service = known.service.lock();
  if (service == nullptr) {
    service = std::make_shared<IoService>();
    known.service = service;
  }
  return service;
}

IoService::IoService() : owner_(::getpid()), state_(std::make_unique<State>()) {
  state_->context.set(zmq::ctxopt::max_sockets, kMaxSockets);
  const BlockSignals blocked;
  state_->thread = std::thread([state = state_.get()] { loop(*state); });
}

IoService::~IoService() {
  if (foreign()) {
    // The thread does not exist here, and closing the context would touch sockets that the parent
    // uses.
    (void)state_.release();
    return;
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->wake.signal();
  state_->thread.join();
}

bool IoService::foreign() const noexcept { return ::getpid() != owner_; }

void IoService::post(std::function<void()> task) {
  bool first = false;
  {
    const std::lock_guard lock(state_->mutex);
    first = state_->tasks.empty();
    state_->tasks.push_back(std::move(task));
  }
  if (first) {
    state_->wake.signal();
  }
}

void IoService::run(const std::function<void()>& task) {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  std::exception_ptr error;
  post([&] {
    // The handler is left before the caller hears of the error, so that the caller alone ends the
    // exception.
    std::exception_ptr caught;
    try {
      task();
    } catch (...) {
      caught = std::current_exception();
    }
    const std::lock_guard lock(mutex);
    error = std::move(caught);
    done = true;
    changed.notify_one();
  });
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return done; });
  if (error) {
    std::rethrow_exception(error);
  }
}

zmq::context_t& IoService::context() noexcept { return state_->context; }

Pacer& IoService::pacer() noexcept { return state_->pacer; }
ZapHandler& IoService::zap() {
  if (state_->zap == nullptr) {
    state_->zap = std::make_unique<ZapHandler>(state_->context);
    add(*state_->zap);
  }
  return *state_->zap;
}

void IoService::add(IoHandler& handler) { state_->handlers.push_back(&handler); }

void IoService::remove(IoHandler& handler) { std::erase(state_->handlers, &handler); }

void IoService::loop(State& state) {
  ::pthread_setname_np(::pthread_self(), "distro-io");
  Deadline wake = Deadline::max();
  std::vector<std::function<void()>> tasks;
  std::vector<zmq::pollitem_t> items;
  std::vector<std::size_t> ends;
  while (true) {
    state.wake.clear();
    {
      const std::lock_guard lock(state.mutex);
      if (state.stop && state.tasks.empty()) {
        return;
      }
      tasks.swap(state.tasks);
    }
    for (const auto& task : tasks) {
      try {
        task();
      } catch (const std::exception& error) {
        log(LogLevel::error, std::string("[distro] I/O thread: ") + error.what());
      }
    }
    if (!tasks.empty()) {
      wake = Deadline::min();  // they may have left work
      tasks.clear();
    }

    items.assign(1, {nullptr, state.wake.get(), ZMQ_POLLIN, 0});
    ends.clear();
    for (IoHandler* handler : state.handlers) {
      handler->append_poll_items(items);
      ends.push_back(items.size());
    }
    if (::zmq_poll(items.data(), static_cast<int>(items.size()), poll_milliseconds(wake)) < 0 &&
        zmq_errno() != EINTR) {
      log_once(LogLevel::error, "zmq_poll",
               std::string("[distro] zmq_poll: ") + zmq_strerror(zmq_errno()));
    }

    wake = Deadline::max();
    std::size_t begin = 1;
    const std::vector<IoHandler*> handlers = state.handlers;
    for (std::size_t i = 0; i < handlers.size(); ++i) {
      const std::span own(items.data() + begin, ends[i] - begin);
      begin = ends[i];
      try {
        wake = std::min(wake, handlers[i]->work(Clock::now(), own));
      } catch (const std::exception& error) {
        std::erase(state.handlers, handlers[i]);
        handlers[i]->fail(error.what());
      }
    }
  }
}

}  // namespace distro::transport
