#include "backend/exchange/transfers.h"

#include <fmt/format.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "backend/exchange/error.h"
#include "backend/exchange/text.h"

namespace distro::exchange {
namespace {

// How often it is looked whether a rank was lost on the group's other channel, and what to tell of
// a large operation. Longer: the news is late; shorter: the thread wakes for nothing.
constexpr std::chrono::milliseconds kLookAgain{500};

// Messages that are taken before the thread looks at what is to be sent: one at a time would look
// for nothing, more would let the line idle.
constexpr int kMessagesAtATime = 32;

// A fault that another rank has told all ranks of.
class ToldFault : public ExchangeError {
 public:
  using ExchangeError::ExchangeError;
};

}  // namespace

Transfers::Transfers(transport::Channel& channel, Config config)
    : config_(std::move(config)),
      channel_(channel),
      streams_(channel, callbacks_, config_.rank, config_.window_bytes),
      messages_(channel, callbacks_, config_.rank, config_.world_size, config_.window_bytes),
      reports_(config_.rank, config_.first_report),
      owner_(::getpid()),
      thread_([this] { run(); }) {
  ::pthread_setname_np(thread_.native_handle(), "distro-exact");
}

Transfers::~Transfers() { close(); }

bool Transfers::foreign() const noexcept { return ::getpid() != owner_; }

void Transfers::post(Task task) {
  {
    const std::lock_guard lock(mutex_);
    if (failure_) {
      std::rethrow_exception(failure_);
    }
    if (closing_ || foreign()) {
      throw ExchangeError(fmt::format(
          "rank {}: this process group has been destroyed, or belongs to the process that this one "
          "was forked from",
          config_.rank));
    }
    busy_ = true;
    tasks_.push_back(std::move(task));
  }
  channel_.wake();
}

void Transfers::open(std::uint32_t stream, std::vector<int> members) {
  post([this, stream, members = std::move(members)](transport::Deadline) {
    streams_.open(stream, members);
  });
}

void Transfers::issue(Collective collective) {
  post([this, what = std::make_shared<Collective>(std::move(collective))](transport::Deadline now) {
    streams_.issue(std::move(*what), now);
  });
}

void Transfers::send(OutgoingMessage message) {
  post([this, what = std::make_shared<OutgoingMessage>(std::move(message))](
           transport::Deadline now) { messages_.send(std::move(*what), now); });
}

void Transfers::want(WantedMessage message) {
  post([this, what = std::make_shared<WantedMessage>(std::move(message))](transport::Deadline now) {
    messages_.want(std::move(*what), now);
  });
}

void Transfers::take(int peer, transport::Bytes message, transport::Deadline now) {
  OpenedTransfer opened;
  try {
    opened = open_transfer(message);
  } catch (const EnvelopeError& error) {
    throw Misbehaviour(peer, fmt::format("rank {}: rank {} sent what is no message of an exact "
                                         "collective: {}",
                                         config_.rank, peer, error.what()));
  }
  switch (opened.header.kind) {
    case TransferKind::collective:
    case TransferKind::stream_credit:
      return streams_.take(peer, std::move(message), opened, now);
    case TransferKind::message:
    case TransferKind::message_credit:
    case TransferKind::pool_credit:
      return messages_.take(peer, opened, now);
    case TransferKind::fault: {
      const std::string_view text(reinterpret_cast<const char*>(opened.payload.data()),
                                  opened.payload.size());
      throw ToldFault(fmt::format("rank {} says: {}", peer, printable(text, kMaxFaultBytes)));
    }
  }
}

Transfers::Task Transfers::next_task() {
  const std::lock_guard lock(mutex_);
  if (tasks_.empty()) {
    return {};
  }
  Task task = std::move(tasks_.front());
  tasks_.pop_front();
  return task;
}

std::optional<transport::Deadline> Transfers::closing() {
  const std::lock_guard lock(mutex_);
  return closing_;
}

std::string Transfers::destroyed() const {
  return fmt::format(
      "rank {}: this process group was destroyed while exact collectives were under way",
      config_.rank);
}

transport::Deadline Transfers::step(transport::Deadline now) {
  while (const Task task = next_task()) {
    task(now);
  }
  transport::Deadline next = transport::Deadline::max();
  if (const auto since = closing()) {
    next = messages_.drain(*since, now, std::make_exception_ptr(Interrupted(destroyed())));
  }
  const bool of_streams = streams_.pump(now);
  const bool more = messages_.pump(now) || of_streams;
  next = std::min({next, streams_.check(now), messages_.check(now)});
  const bool idle = streams_.idle() && messages_.idle();
  const TransferProgress* moving = streams_.moving();
  reports_.look(moving != nullptr ? moving : messages_.moving(), now);
  if (!idle) {
    next = std::min(next, now + kLookAgain);
    if (const auto lost = config_.lost ? config_.lost() : std::nullopt) {
      throw *lost;
    }
  }
  {
    const std::lock_guard lock(mutex_);
    busy_ = !idle || !tasks_.empty();
    if (!busy_) {
      ended_.notify_all();
    }
  }
  return more ? now : next;
}

void Transfers::work() {
  auto now = transport::Clock::now();
  transport::Deadline next = step(now);
  while (!stopping()) {
    for (int i = 0; i < kMessagesAtATime; ++i) {
      try {
        auto arrival = channel_.receive_any(i == 0 ? next : now);
        if (!arrival) {
          break;
        }
        now = transport::Clock::now();
        take(arrival->peer, std::move(arrival->message), now);
      } catch (const transport::PeerLeft& left) {
        streams_.leave(left);
        messages_.leave(left);
      }
    }
    now = transport::Clock::now();
    next = step(now);
  }
}

bool Transfers::stopping() {
  const std::lock_guard lock(mutex_);
  return stopping_ || failure_ != nullptr;
}

void Transfers::run() noexcept {
  std::exception_ptr error;
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  {
    const std::lock_guard lock(mutex_);
    if (!error) {
      error = failure_;  // given from outside
    }
    if (!error) {
      error = std::make_exception_ptr(Interrupted(destroyed()));
    }
  }
  give_up(error);
}

// Everything fails; before that the others hear of it, so that none of them waits in vain.
void Transfers::give_up(const std::exception_ptr& error) {
  {
    const std::lock_guard lock(mutex_);
    failure_ = error;
  }
  blame(error);
  while (const Task task = next_task()) {
    try {
      task(transport::Clock::now());
    } catch (const std::exception&) {
      // what it would have done fails below
    }
  }
  streams_.fail(error);
  messages_.fail(error);
  const std::lock_guard lock(mutex_);
  busy_ = false;
  ended_.notify_all();
}

void Transfers::blame(const std::exception_ptr& error) noexcept {
  const auto report = [&](int culprit, const std::string& reason) {
    if (config_.on_failure) {
      config_.on_failure(culprit, reason);
    }
  };
  try {
    std::rethrow_exception(error);
  } catch (const Interrupted&) {
  } catch (const ToldFault&) {
  } catch (const transport::ClosedError&) {
  } catch (const transport::PeerError& known) {
    report(known.rank(), known.what());
  } catch (const Misbehaviour& known) {
    report(known.rank(), known.what());
  } catch (const ExchangeError& known) {
    tell_fault(known.what());
  } catch (const std::exception& own) {
    report(config_.rank, own.what());  // this rank's own trouble: the others would wait in vain
  }
}

void Transfers::tell_fault(std::string_view reason) noexcept {
  try {
    std::vector<int> peers;
    for (int peer = 0; peer < config_.world_size; ++peer) {
      if (peer != config_.rank) {
        peers.push_back(peer);
      }
    }
    const auto text = std::as_bytes(std::span(reason.substr(0, kMaxFaultBytes)));
    channel_.multicast(peers, std::make_shared<const transport::Bytes>(
                                  write_transfer({.kind = TransferKind::fault}, nullptr, text)));
  } catch (const std::exception& error) {
    transport::log(transport::LogLevel::debug,
                   fmt::format("[distro rank {}] {}", config_.rank, error.what()));
  }
}

void Transfers::fail(const std::exception_ptr& error) noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (failure_ || foreign()) {
      return;
    }
    failure_ = error;
  }
  channel_.wake();
}

void Transfers::close() noexcept {
  if (foreign()) {
    return;  // the threads are the parent's
  }
  const std::lock_guard joining(joining_);
  if (!thread_.joinable()) {
    return;
  }
  {
    std::unique_lock lock(mutex_);
    closing_ = closing_ ? closing_ : transport::Clock::now();
    channel_.wake();
    ended_.wait(lock, [this] { return !busy_; });
    stopping_ = true;
  }
  channel_.wake();
  thread_.join();
  callbacks_.close();
}

}  // namespace distro::exchange
