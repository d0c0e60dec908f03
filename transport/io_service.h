#pragma once

#include <sys/types.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>
#include <zmq.hpp>

#include "transport/channel.h"
#include "transport/pacer.h"

namespace distro::transport {

class ZapHandler;

/// What one channel has the I/O thread do. All members are called by that thread.
class IoHandler {
 public:
  IoHandler() = default;
  IoHandler(const IoHandler&) = delete;
  IoHandler& operator=(const IoHandler&) = delete;
  virtual ~IoHandler() = default;

  /// Append the sockets to watch.
  virtual void append_poll_items(std::vector<zmq::pollitem_t>& items) = 0;

  /// Do all that can be done without waiting; `items` are the own ones, with their events. Returns
  /// when to be called again even if no socket has anything.
  virtual Deadline work(Deadline now, std::span<const zmq::pollitem_t> items) = 0;

  /// work threw: the channel is given up and will not be called any more.
  virtual void fail(const std::string& reason) noexcept = 0;
};

/// The process's one ZeroMQ context and the one thread that touches its sockets, for all channels
/// of all groups. The first channel starts it; the last one to let go joins the thread and ends the
/// context. In a forked child it is dead weight: `foreign()` is true, nothing may be called, and
/// the destructor does nothing.
class IoService {
 public:
  /// The running service, or a new one. The one global state of this room beside the log.
  static std::shared_ptr<IoService> acquire();

  IoService();
  ~IoService();
  IoService(const IoService&) = delete;
  IoService& operator=(const IoService&) = delete;

  [[nodiscard]] bool foreign() const noexcept;

  /// Run on the I/O thread, later and in order. Any thread.
  void post(std::function<void()> task);

  /// Run on the I/O thread and wait; rethrows what it throws. Not from the I/O thread.
  void run(const std::function<void()>& task);

  // The rest: I/O thread only.
  zmq::context_t& context() noexcept;
  /// The process's one.
  Pacer& pacer() noexcept;
  /// Checks the keys of all channels that have some; made when it is first asked for.
  ZapHandler& zap();
  void add(IoHandler& handler);
  void remove(IoHandler& handler);

 private:
  struct State;
  static void loop(State& state);

  pid_t owner_;
  std::unique_ptr<State> state_;
};

}  // namespace distro::transport
