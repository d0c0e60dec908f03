#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

namespace distro::c10d_backend {

/// What one process group was asked to do: numbers its operations, remembers the last of them for
/// the log, and tells torch's flight recorder which of them have finished. Thread-safe.
class Operations {
 public:
  /// One operation, from the call to its completion.
  struct Ticket {
    std::uint64_t sequence;  ///< Of the group's collectives, or of its point-to-point operations.
    std::uint64_t key;       ///< Never used again by this or another group.
  };
  using CompletionHook = std::function<void(std::uint64_t key)>;
  using AbortHook = std::function<void()>;

  /// An operation begins. `name` ("all_reduce") is static text.
  Ticket begin(const char* name, bool point_to_point, std::size_t bytes);

  /// It has finished, and not failed: what failed is to look unfinished to whoever asks later.
  void finish(const Ticket& ticket);

  /// The last operations, oldest first: number, size, and how long each took or has been waiting.
  [[nodiscard]] std::string text() const;

  /// Number of the last collective.
  [[nodiscard]] std::uint64_t sequence() const;

  // Hooks, by the caller's number. They run on whichever thread finishes an operation or meets an
  // error, without a lock of ours and without Python's.
  void add_completion_hook(std::int64_t id, CompletionHook hook);
  void remove_completion_hook(std::int64_t id);
  void add_abort_hook(std::int64_t id, AbortHook hook);
  void remove_abort_hook(std::int64_t id);

  /// The group cannot go on: run the abort hooks.
  void run_abort_hooks() const noexcept;

 private:
  using Clock = std::chrono::steady_clock;

  // How many operations are remembered: enough to see where ranks part ways, few enough for a log.
  static constexpr std::size_t kRemembered = 16;

  struct Entry {
    const char* name = nullptr;
    Ticket ticket{};
    std::size_t bytes = 0;
    Clock::time_point begun;
    std::optional<Clock::time_point> finished;
  };

  mutable std::mutex mutex_;
  std::array<Entry, kRemembered> entries_{};  // a ring: operation n lies at n % kRemembered
  std::uint64_t begun_ = 0;
  std::uint64_t collectives_ = 0;
  std::uint64_t point_to_point_ = 0;

  mutable std::mutex hooks_mutex_;
  std::map<std::int64_t, CompletionHook> completion_hooks_;
  std::map<std::int64_t, AbortHook> abort_hooks_;
};

}  // namespace distro::c10d_backend
