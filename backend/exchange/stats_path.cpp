#include "backend/exchange/stats_path.h"

#include <fmt/format.h>
#include <unistd.h>

#include <filesystem>

#include "backend/exchange/error.h"

namespace distro::exchange {

namespace fs = std::filesystem;

void check_stats_path(const std::string& path) {
  if (path.empty()) {
    return;
  }
  const auto refuse = [&](const std::string& why) {
    throw OptionError(fmt::format(
        "DISTRO_STATS={}: {}. Give the path of a file, such as stats.json, in a folder that this "
        "process may write to.",
        path, why));
  };
  std::error_code ignored;
  const fs::path given = fs::absolute(path, ignored);
  if (!given.has_filename() || fs::is_directory(given, ignored)) {
    refuse("it is a folder");
  }
  fs::path folder = given.parent_path();
  while (!fs::exists(folder, ignored) && folder != folder.parent_path()) {
    folder = folder.parent_path();
  }
  if (!fs::is_directory(folder, ignored)) {
    refuse(fmt::format("{} is not a folder", folder.string()));
  }
  if (::access(folder.c_str(), W_OK | X_OK) != 0) {
    refuse(fmt::format("{} may not be written to", folder.string()));
  }
}

}  // namespace distro::exchange
