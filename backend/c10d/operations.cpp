#include "backend/c10d/operations.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "backend/c10d/python_lock.h"
#include "transport/log.h"

namespace distro::c10d_backend {
namespace {

// Keys of several groups and of other backends meet in one table of the flight recorder; others use
// small numbers or addresses. An address of at most 47 bits, shifted, is neither.
std::uint64_t key_of(const void* group, std::uint64_t operation) {
  return (static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(group)) << 16U) + operation;
}

double seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

template <typename Hook>
std::vector<Hook> copies(const std::map<std::int64_t, Hook>& hooks, std::mutex& mutex) {
  std::vector<Hook> result;
  const std::lock_guard lock(mutex);
  std::ranges::transform(hooks, std::back_inserter(result), [](const auto& e) { return e.second; });
  return result;
}

}  // namespace

Operations::Ticket Operations::begin(const char* name, bool point_to_point, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  Entry& entry = entries_[begun_ % kRemembered];
  const std::uint64_t sequence = point_to_point ? ++point_to_point_ : ++collectives_;
  entry = {name, {sequence, key_of(this, begun_)}, bytes, Clock::now(), std::nullopt};
  ++begun_;
  return entry.ticket;
}

void Operations::finish(const Ticket& ticket) {
  {
    const std::lock_guard lock(mutex_);
    Entry& entry = entries_[(ticket.key - key_of(this, 0)) % kRemembered];
    if (entry.ticket.key == ticket.key) {  // else a later one has taken its place
      entry.finished = Clock::now();
    }
  }
  for (const auto& hook : copies(completion_hooks_, hooks_mutex_)) {
    hook(ticket.key);
  }
}

std::string Operations::text() const {
  const std::lock_guard lock(mutex_);
  std::string result;
  const std::uint64_t remembered = std::min<std::uint64_t>(begun_, kRemembered);
  for (std::uint64_t n = begun_ - remembered; n < begun_; ++n) {
    const Entry& entry = entries_[n % kRemembered];
    result += fmt::format("{}{} {}, {} bytes: ", result.empty() ? "" : "; ", entry.name,
                          entry.ticket.sequence, entry.bytes);
    result += entry.finished
                  ? fmt::format("{:.3f} s", seconds(*entry.finished - entry.begun))
                  : fmt::format("not finished after {:.3f} s", seconds(Clock::now() - entry.begun));
  }
  return result.empty() ? "none" : result;
}

std::uint64_t Operations::sequence() const {
  const std::lock_guard lock(mutex_);
  return collectives_;
}

void Operations::add_completion_hook(std::int64_t id, CompletionHook hook) {
  const std::lock_guard lock(hooks_mutex_);
  completion_hooks_[id] = std::move(hook);
}

void Operations::remove_completion_hook(std::int64_t id) {
  const std::lock_guard lock(hooks_mutex_);
  completion_hooks_.erase(id);
}

void Operations::add_abort_hook(std::int64_t id, AbortHook hook) {
  const std::lock_guard lock(hooks_mutex_);
  abort_hooks_[id] = std::move(hook);
}

void Operations::remove_abort_hook(std::int64_t id) {
  const std::lock_guard lock(hooks_mutex_);
  abort_hooks_.erase(id);
}

void Operations::run_abort_hooks() const noexcept {
  const WithoutPythonLock
      without_lock;  // the recorder's dump asks another thread for Python frames
  try {
    for (const auto& hook : copies(abort_hooks_, hooks_mutex_)) {
      hook();
    }
  } catch (const std::exception& error) {
    transport::log(transport::LogLevel::warning,
                   fmt::format("an abort hook of a process group failed: {}", error.what()));
  }
}

}  // namespace distro::c10d_backend
