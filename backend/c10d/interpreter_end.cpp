#include "backend/c10d/interpreter_end.h"

#include <unistd.h>

#include <atomic>
#include <thread>

namespace distro::c10d_backend {
namespace {

// The thread that ends the interpreter; none before.
std::atomic<std::thread::id>& ending_thread() {
  static std::atomic<std::thread::id> thread{};
  return thread;
}

}  // namespace

void begin_interpreter_end() noexcept { ending_thread() = std::this_thread::get_id(); }

void stay_if_interpreter_ends() noexcept {
  const auto ending = ending_thread().load();
  if (ending == std::thread::id{} || ending == std::this_thread::get_id()) {
    return;
  }
  for (;;) {
    ::pause();
  }
}

}  // namespace distro::c10d_backend
