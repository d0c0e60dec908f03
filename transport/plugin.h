#pragma once

#include <memory>
#include <string>

#include "transport/abi.h"

namespace distro::transport {

/// A third-party transport: a shared library that speaks transport/abi.h. Immutable; any thread.
class Plugin {
 public:
  /// Load a library. Throws ConfigError that names the path and what to do: the file cannot be
  /// loaded, is no transport, or one of another version.
  static std::shared_ptr<const Plugin> load(const std::string& path);

  /// Check a table that is in memory already; `path` is for error texts. Throws ConfigError.
  Plugin(const distro_transport* table, std::string path);

  /// The functions; those that this version knows and an older library does not have are null.
  [[nodiscard]] const distro_transport& table() const noexcept { return table_; }
  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  /// Name and version, which all ranks of a group must share: "example 1.0".
  [[nodiscard]] const std::string& identity() const noexcept { return identity_; }

 private:
  distro_transport table_{};
  std::string path_;
  std::string identity_;
};

}  // namespace distro::transport
