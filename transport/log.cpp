#include "transport/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>

namespace distro::transport {
namespace {

// Keys of log_once. Fewer: later events of a new kind would be silent; more: a hostile peer that
// provokes ever new keys takes more memory.
constexpr std::size_t kMaxOnceKeys = 4096;

struct Log {
  std::shared_ptr<spdlog::logger> logger = spdlog::get("torch_distro");
  std::mutex mutex;
  std::unordered_set<std::string> seen;

  Log() {
    if (logger == nullptr) {
      logger = spdlog::stderr_logger_mt("torch_distro");
      logger->set_pattern("%Y-%m-%d %H:%M:%S.%e %l %v");
      logger->set_level(spdlog::level::warn);
    }
  }
};

// Leaked on purpose: channels that static objects own still log while the process exits.
Log& instance() {
  static Log& log = *std::make_unique<Log>().release();
  return log;
}

spdlog::level::level_enum to_spdlog(LogLevel level) noexcept {
  switch (level) {
    case LogLevel::error:
      return spdlog::level::err;
    case LogLevel::warning:
      return spdlog::level::warn;
    case LogLevel::info:
      return spdlog::level::info;
    case LogLevel::debug:
      return spdlog::level::debug;
  }
  return spdlog::level::warn;
}

}  // namespace

void set_log_level(LogLevel level) { instance().logger->set_level(to_spdlog(level)); }

void log(LogLevel level, std::string_view message) noexcept {
  try {
    instance().logger->log(to_spdlog(level), spdlog::string_view_t(message.data(), message.size()));
  } catch (...) {  // a line that cannot be written must not end a training
  }
}

void log_once(LogLevel level, std::string_view key, std::string_view message) noexcept {
  try {
    Log& state = instance();
    {
      const std::lock_guard lock(state.mutex);
      if (state.seen.size() >= kMaxOnceKeys || !state.seen.emplace(key).second) {
        return;
      }
    }
    log(level, message);
  } catch (...) {
  }
}

}  // namespace distro::transport
