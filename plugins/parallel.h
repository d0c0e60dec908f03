#pragma once

#include <oneapi/tbb/task_arena.h>

#include <cstddef>

#if defined(__SANITIZE_THREAD__)
#define DISTRO_THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define DISTRO_THREAD_SANITIZER 1
#endif
#endif

#if defined(DISTRO_THREAD_SANITIZER)
#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>
#else
#include <tbb/parallel_for.h>
#endif

namespace distro::plugins {

/// work() with its tasks in this arena; null: the caller's.
template <class Work>
auto in_arena(tbb::task_arena* arena, const Work& work) {
  return arena == nullptr ? work() : arena->execute(work);
}

/// task(i) for every i below n, as oneTBB tasks inside the caller's arena; returns when all are
/// done. An exception of a task is thrown here (one of them, if several throw), and tasks not yet
/// begun may then be left out.
template <class Task>
void parallel_for(std::size_t n, const Task& task) {
#if defined(DISTRO_THREAD_SANITIZER)
  // libtbb is not instrumented: ThreadSanitizer sees none of the order that it keeps and reports
  // every task. Plain threads in its place let it check ours without suppressions that would hide
  // our own races as well.
  constexpr std::size_t kThreads = 3;
  std::atomic<std::size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
    for (std::size_t i = next++; i < n; i = next++) {
      try {
        task(i);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        error = std::current_exception();
      }
    }
  };
  std::vector<std::thread> threads;
  for (std::size_t i = 1; i < std::min(n, kThreads); ++i) {
    threads.emplace_back(work);
  }
  work();
  for (std::thread& thread : threads) {
    thread.join();
  }
  if (error) {
    std::rethrow_exception(error);
  }
#else
  tbb::parallel_for(std::size_t{0}, n, task);
#endif
}

}  // namespace distro::plugins
