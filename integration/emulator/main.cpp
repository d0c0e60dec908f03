// Forwards IPv4 packets between network namespaces as home lines would: at their rates, late, and
// not all of them. Commands are lines on standard input (control.h), answered on standard output;
// the first line of output says that all interfaces are there. Ends with its input.

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/epoll.h>
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "integration/emulator/control.h"
#include "integration/emulator/network.h"
#include "integration/emulator/tun.h"

namespace distro::emulator {
namespace {

// Packets that are read from one host before the next has its turn. Fewer: more calls of epoll a
// packet; more: hosts that send much delay the others'.
constexpr int kBatch = 64;

// Packets are delivered up to so much late, several at once. Less: this process wakes for each one
// and takes the processor from the trainings; more: short round trips are wrong.
constexpr Time kTick = std::chrono::microseconds(200);

// Longest command. Longer ones are no commands.
constexpr std::size_t kCommandBytes = 64 << 10;

// Beside trainings that use all cores, packets would wait for their time slices.
constexpr int kNiceness = -15;

struct Options {
  std::vector<std::string> namespaces;
  std::vector<std::string> addresses;
  std::string interface = "line";
  std::uint64_t seed = 1;
  // Of 1500 bytes: 100 MB, that is eight lines of 1 Gbit/s with 100 ms under way.
  std::size_t packets = 65'536;
};

Time now() { return std::chrono::steady_clock::now().time_since_epoch(); }

[[noreturn]] void fail(const char* call) {
  throw std::system_error(errno, std::generic_category(), call);
}

class Emulator {
 public:
  explicit Emulator(const Options& options)
      : network_(addresses_of(options), options.packets, options.seed),
        epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
    if (epoll_.get() < 0) {
      fail("epoll_create1");
    }
    for (std::size_t host = 0; host < options.namespaces.size(); ++host) {
      tuns_.push_back(open_tun(options.namespaces[host], options.interface));
      watch(tuns_.back().get(), host);
    }
    if (::fcntl(STDIN_FILENO, F_SETFL, O_NONBLOCK) != 0) {
      fail("fcntl");
    }
    watch(STDIN_FILENO, tuns_.size());
  }

  void run() {
    const Network::Deliver deliver = [this](std::size_t host, std::span<const std::byte> packet) {
      // What an interface that is down, or full, does not take is lost, as elsewhere.
      [[maybe_unused]] const auto ignored =
          ::write(tuns_[host].get(), packet.data(), packet.size());
    };
    std::array<epoll_event, 16> events{};
    bool open = true;
    while (open) {
      const int count = wait(events);
      for (int i = 0; i < count; ++i) {
        const auto source = static_cast<std::size_t>(events[static_cast<std::size_t>(i)].data.u64);
        if (source == tuns_.size()) {
          open = read_commands();
        } else {
          read_packets(source);
        }
      }
      network_.advance(now(), deliver);
    }
  }

 private:
  static std::vector<Address> addresses_of(const Options& options) {
    if (options.addresses.size() != options.namespaces.size()) {
      throw std::invalid_argument("--namespaces and --addresses differ in number");
    }
    std::vector<Address> addresses;
    for (const auto& text : options.addresses) {
      addresses.push_back(parse_address(text));
    }
    return addresses;
  }

  void watch(int file, std::size_t source) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.u64 = source;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, file, &event) != 0) {
      fail("epoll_ctl");
    }
  }

  int wait(std::array<epoll_event, 16>& events) {
    timespec left{};
    const timespec* limit = nullptr;
    if (const auto next = network_.next()) {
      const Time span = std::max(*next - now(), kTick);
      const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(span);
      left.tv_sec = seconds.count();
      left.tv_nsec = (span - seconds).count();
      limit = &left;
    }
    const int count = ::epoll_pwait2(epoll_.get(), events.data(), static_cast<int>(events.size()),
                                     limit, nullptr);
    if (count < 0 && errno != EINTR) {
      fail("epoll_pwait2");
    }
    return std::max(count, 0);
  }

  void read_packets(std::size_t host) {
    for (int i = 0; i < kBatch; ++i) {
      const auto bytes = ::read(tuns_[host].get(), buffer_.data(), buffer_.size());
      if (bytes <= 0) {
        if (bytes < 0 && errno != EAGAIN && errno != EINTR) {
          fail("read of a TUN interface");
        }
        return;
      }
      network_.send(host, std::span(buffer_).first(static_cast<std::size_t>(bytes)), now());
    }
  }

  /// False: the input has ended.
  bool read_commands() {
    std::array<char, 4096> chunk{};
    const auto bytes = ::read(STDIN_FILENO, chunk.data(), chunk.size());
    if (bytes <= 0) {
      return bytes < 0 && (errno == EAGAIN || errno == EINTR);
    }
    commands_.append(chunk.data(), static_cast<std::size_t>(bytes));
    std::size_t end = 0;
    while ((end = commands_.find('\n')) != std::string::npos) {
      fmt::print("{}\n", execute(std::string_view(commands_).substr(0, end), network_, now()));
      commands_.erase(0, end + 1);
    }
    if (commands_.size() > kCommandBytes) {
      throw std::runtime_error("a command without an end");
    }
    std::fflush(stdout);
    return true;
  }

  Network network_;
  Descriptor epoll_;
  std::vector<Descriptor> tuns_;
  // An interface whose MTU was raised sends more, which is cut here and so refused as malformed.
  std::array<std::byte, kPacketBytes> buffer_{};
  std::string commands_;
};

int run(int argc, char** argv) {
  Options options;
  CLI::App app("Forwards IPv4 packets between network namespaces as home lines would.");
  app.add_option("--namespaces", options.namespaces, "names of `ip netns`, one a host")
      ->required()
      ->delimiter(',');
  app.add_option("--addresses", options.addresses, "IPv4 addresses of the hosts, in this order")
      ->required()
      ->delimiter(',');
  app.add_option("--interface", options.interface, "name of the interface made in each namespace")
      ->capture_default_str();
  app.add_option("--seed", options.seed, "of loss, jitter, reordering and duplication")
      ->capture_default_str();
  app.add_option("--packets", options.packets, "packets under way at once")
      ->capture_default_str()
      ->check(CLI::Range(1U, 1U << 24));
  CLI11_PARSE(app, argc, argv);

  try {
    Emulator emulator(options);
    // Without the right to it, it runs as it is.
    ::setpriority(PRIO_PROCESS, 0, kNiceness);
    fmt::print("{{}}\n");
    std::fflush(stdout);
    emulator.run();
    return 0;
  } catch (const std::exception& error) {
    fmt::print("{}\n", nlohmann::json({{"error", error.what()}}).dump());
    return 1;
  }
}

}  // namespace
}  // namespace distro::emulator

int main(int argc, char** argv) { return distro::emulator::run(argc, argv); }
