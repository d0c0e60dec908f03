#include "transport/host.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

#include "transport/channel.h"

namespace distro::transport {
namespace {

struct Status {
  char state = '?';
  std::uint64_t start = 0;
};

std::optional<std::string> read_small_file(const char* path) {
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    return std::nullopt;
  }
  std::array<char, 4096> buffer{};
  const ssize_t count = ::read(fd, buffer.data(), buffer.size());
  const int error = errno;
  ::close(fd);
  errno = error;
  if (count < 0) {
    return std::nullopt;
  }
  return std::string(buffer.data(), static_cast<std::size_t>(count));
}

// proc(5): "pid (comm) state ppid ...", start time is field 22. comm may hold spaces and brackets.
std::optional<Status> read_status(std::int64_t pid) {
  const auto text = read_small_file(fmt::format("/proc/{}/stat", pid).c_str());
  if (!text) {
    return std::nullopt;
  }
  const std::size_t bracket = text->rfind(')');
  if (bracket == std::string::npos || bracket + 2 >= text->size()) {
    errno = EPROTO;
    return std::nullopt;
  }
  std::string_view rest = std::string_view(*text).substr(bracket + 2);
  Status status;
  status.state = rest.front();
  for (int field = 3; field < 22; ++field) {
    const std::size_t space = rest.find(' ');
    if (space == std::string_view::npos) {
      errno = EPROTO;
      return std::nullopt;
    }
    rest.remove_prefix(space + 1);
  }
  std::from_chars(rest.data(), rest.data() + rest.size(), status.start);
  return status;
}

std::uint64_t inode_of(const char* path) {
  struct stat info {};
  return ::stat(path, &info) == 0 ? static_cast<std::uint64_t>(info.st_ino) : 0;
}

}  // namespace

ProcessId this_process() {
  const auto status = read_status(::getpid());
  if (!status) {
    throw ConfigError(
        fmt::format("cannot read /proc/self/stat ({}): torch-distro needs a mounted /proc to tell "
                    "dead ranks from slow ones",
                    std::strerror(errno)));
  }
  return {::getpid(), status->start};
}

bool is_alive(const ProcessId& process) noexcept {
  try {
    const auto status = read_status(process.pid);
    if (!status) {
      // /proc may hide processes of other users (hidepid); kill() then says EPERM.
      const bool absent = errno == ENOENT || errno == ESRCH;
      return !absent || ::kill(static_cast<pid_t>(process.pid), 0) == 0 || errno != ESRCH;
    }
    return status->state != 'Z' && status->state != 'X' && status->start == process.start;
  } catch (...) {
    return true;
  }
}

std::string host_identity() {
  std::string boot = read_small_file("/proc/sys/kernel/random/boot_id").value_or("unknown");
  while (!boot.empty() && boot.back() == '\n') {
    boot.pop_back();
  }
  return fmt::format("{}/{}/{}", boot, inode_of("/proc/self/ns/pid"),
                     inode_of("/proc/self/ns/net"));
}

}  // namespace distro::transport
