#include "transport/plugin.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <string_view>
#include <utility>

#include "transport/error.h"

namespace distro::transport {
namespace {

constexpr const char* kSymbol = "distro_transport_plugin";
constexpr std::size_t kLongestName = 63;
// Above it, what claims to be the table's size is taken for garbage.
constexpr std::size_t kLargestTable = 64 * 1024;

[[noreturn]] void refuse(const std::string& path, std::string_view why) {
  throw ConfigError(
      fmt::format("{} cannot be used as a transport: {}. DISTRO_TRANSPORT takes tcp, ipc, or the "
                  "path of a shared library that follows transport/abi.h, version {} "
                  "(docs/transports.md)",
                  path, why, DISTRO_TRANSPORT_ABI));
}

// A name or version of the table.
std::string word(const char* text, const char* what, const std::string& path) {
  if (text == nullptr) {
    refuse(path, fmt::format("its {} is null", what));
  }
  const std::string_view found(text, ::strnlen(text, kLongestName + 1));
  if (found.empty() || found.size() > kLongestName ||
      !std::ranges::all_of(found, [](char c) { return c >= ' ' && c <= '~'; })) {
    refuse(path,
           fmt::format("its {} is not 1 to {} printable ASCII characters", what, kLongestName));
  }
  return std::string(found);
}

}  // namespace

std::shared_ptr<const Plugin> Plugin::load(const std::string& path) {
  // It stays loaded until the process ends: it may have threads, or functions to run at exit.
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (library == nullptr) {
    const char* why = ::dlerror();
    refuse(path, why == nullptr ? "it cannot be loaded" : why);
  }
  void* symbol = ::dlsym(library, kSymbol);
  if (symbol == nullptr) {
    refuse(path, fmt::format("it does not export {}", kSymbol));
  }
  const auto entry = reinterpret_cast<distro_transport_entry>(symbol);
  const distro_transport* table = nullptr;
  try {
    table = entry(DISTRO_TRANSPORT_ABI);
  } catch (const std::exception& error) {
    refuse(path, fmt::format("{} threw: {}", kSymbol, error.what()));
  } catch (...) {
    refuse(path, fmt::format("{} threw", kSymbol));
  }
  return std::make_shared<const Plugin>(table, path);
}

Plugin::Plugin(const distro_transport* table, std::string path) : path_(std::move(path)) {
  if (table == nullptr) {
    refuse(path_,
           fmt::format("it does not serve version {} of the interface", DISTRO_TRANSPORT_ABI));
  }
  if (table->abi != DISTRO_TRANSPORT_ABI) {
    refuse(path_, fmt::format("it was built for version {} of the interface; build it against the "
                              "abi.h of this torch-distro",
                              table->abi));
  }
  constexpr std::size_t kRequired = offsetof(distro_transport, counters);
  if (table->struct_size < kRequired || table->struct_size > kLargestTable) {
    refuse(path_, fmt::format("its table has {} bytes, version {} has at least {}",
                              table->struct_size, DISTRO_TRANSPORT_ABI, kRequired));
  }
  std::memcpy(&table_, table, std::min(table->struct_size, sizeof table_));
  identity_ = word(table_.name, "name", path_) + " " + word(table_.version, "version", path_);
  const std::pair<const char*, bool> required[] = {
      {"open", table_.open != nullptr},       {"address", table_.address != nullptr},
      {"poll_fd", table_.poll_fd != nullptr}, {"connect", table_.connect != nullptr},
      {"send", table_.send != nullptr},       {"receive", table_.receive != nullptr},
      {"close", table_.close != nullptr}};
  for (const auto& [name, present] : required) {
    if (!present) {
      refuse(path_, fmt::format("its function '{}' is null", name));
    }
  }
}

}  // namespace distro::transport
