#include "integration/emulator/tun.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <sched.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace distro::emulator {
namespace {

constexpr const char* kDevice = "/dev/net/tun";

Descriptor open_file(const std::string& path, int flags, const char* hint) {
  Descriptor file(::open(path.c_str(), flags | O_CLOEXEC));
  if (file.get() < 0) {
    throw std::runtime_error(
        fmt::format("{}: {} ({})", path, std::generic_category().message(errno), hint));
  }
  return file;
}

void enter(const Descriptor& network_namespace) {
  if (::setns(network_namespace.get(), CLONE_NEWNET) != 0) {
    throw std::runtime_error(
        fmt::format("a network namespace cannot be entered: {} (root is needed)",
                    std::generic_category().message(errno)));
  }
}

}  // namespace

Descriptor open_tun(const std::string& network_namespace, const std::string& interface) {
  ifreq request{};
  if (interface.empty() || interface.size() >= sizeof(request.ifr_name)) {
    throw std::runtime_error(fmt::format("\"{}\" is no name of an interface", interface));
  }
  const auto home = open_file("/proc/self/ns/net", O_RDONLY, "is /proc mounted?");
  const auto away = open_file("/run/netns/" + network_namespace, O_RDONLY,
                              "make the namespace by `ip netns add`");
  // An interface is made in the namespace in which the device is opened.
  enter(away);
  Descriptor tun = open_file(kDevice, O_RDWR | O_NONBLOCK,
                             "root and the kernel's TUN driver are needed; in a container: "
                             "--cap-add=NET_ADMIN --device=/dev/net/tun");
  std::copy(interface.begin(), interface.end(), std::begin(request.ifr_name));
  request.ifr_flags = IFF_TUN | IFF_NO_PI;
  if (::ioctl(tun.get(), TUNSETIFF, &request) != 0) {
    throw std::runtime_error(
        fmt::format("interface \"{}\" cannot be made in {}: {} (are you root?)", interface,
                    network_namespace, std::generic_category().message(errno)));
  }
  enter(home);
  return tun;
}

}  // namespace distro::emulator
