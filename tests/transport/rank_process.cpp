#include "tests/transport/rank_process.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <sstream>
#include <stdexcept>
#include <string>

namespace distro::transport::test {
namespace {

void write_all(int fd, const std::string& text) {
  if (::write(fd, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    throw std::runtime_error("short write to a pipe");
  }
}

// One line; the pipe holds nothing else yet, as the sides take turns.
std::string read_lines(int fd, std::size_t lines) {
  std::string text;
  char c = 0;
  while (lines > 0) {
    if (::read(fd, &c, 1) != 1) {
      throw std::runtime_error("the other end of a pipe is gone");
    }
    text += c;
    lines -= c == '\n' ? 1 : 0;
  }
  return text;
}

std::string to_line(const PeerAddress& a) {
  std::ostringstream out;
  out << a.endpoint << ' ' << a.session << ' ' << a.protocol << ' ' << a.host << ' ' << a.pid << ' '
      << a.pid_start << '\n';
  return out.str();
}

PeerAddress from_stream(std::istream& in) {
  PeerAddress a;
  in >> a.endpoint >> a.session >> a.protocol >> a.host >> a.pid >> a.pid_start;
  return a;
}

}  // namespace

RankProcess::RankProcess(const ChannelConfig& config, const Body& body) {
  std::array<int, 2> up{};
  std::array<int, 2> down{};
  if (::pipe(up.data()) != 0 || ::pipe(down.data()) != 0) {
    throw std::runtime_error("pipe");
  }
  pid_ = ::fork();
  if (pid_ == 0) {
    try {
      const auto channel = open_channel(config);
      write_all(up[1], to_line(channel->address()));
      std::istringstream lines(read_lines(down[0], static_cast<std::size_t>(config.world_size)));
      std::vector<PeerAddress> addresses;
      for (int rank = 0; rank < config.world_size; ++rank) {
        addresses.push_back(from_stream(lines));
      }
      channel->connect(addresses);
      body(*channel);
      ::_exit(0);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "child: %s\n", error.what());
    }
    ::_exit(1);
  }
  ::close(up[1]);
  ::close(down[0]);
  from_child_ = up[0];
  to_child_ = down[1];
  std::istringstream line(read_lines(from_child_, 1));
  address_ = from_stream(line);
}

RankProcess::~RankProcess() {
  kill();
  ::waitpid(pid_, nullptr, 0);
  if (address_.endpoint.rfind("ipc://", 0) == 0) {  // a killed process leaves its directory
    std::filesystem::remove_all(std::filesystem::path(address_.endpoint.substr(6)).parent_path());
  }
  ::close(from_child_);
  ::close(to_child_);
}

void RankProcess::connect(const std::vector<PeerAddress>& addresses) const {
  std::string lines;
  for (const PeerAddress& address : addresses) {
    lines += to_line(address);
  }
  write_all(to_child_, lines);
}

void RankProcess::kill() const { ::kill(pid_, SIGKILL); }

}  // namespace distro::transport::test
