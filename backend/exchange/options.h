#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "backend/exchange/error.h"
#include "kernels/kernels.h"
#include "transport/channel.h"
#include "transport/log.h"
#include "transport/plugin.h"

namespace distro::exchange {

/// auto: weights where a wrapped module is found, exact elsewhere.
enum class Mode : std::uint8_t { automatic, weights, dense };

using StringMap = std::map<std::string, std::string, std::less<>>;

/// The options of one process group, resolved and checked. README.md, "Options", lists them for
/// users.
struct Options {
  Mode mode = Mode::automatic;
  std::uint32_t k = 6;           ///< Entries kept per 4096 weights.
  std::optional<double> gain;    ///< Empty: by the optimizer's class.
  std::optional<double> share;   ///< Empty: gain / participants.
  std::uint32_t value_bits = 1;  ///< 1 or 32.
  int delay = 1;                 ///< Steps that an exchange may travel: 0 or 1.
  transport::Carrier carrier = transport::Carrier::tcp;
  std::shared_ptr<const transport::Plugin> plugin;  ///< Carrier::plugin: the loaded library.
  std::string bind;                                 ///< Empty: what the store's route shows.
  std::string advertise;
  std::uint16_t first_port = 0;
  std::uint16_t last_port = 0;
  bool insecure = false;
  int threads = 0;  ///< 0: cores / local ranks.
  std::string stats_path;
  transport::LogLevel log_level = transport::LogLevel::warning;
  kernels::Isa isa = kernels::Isa::scalar;

  /// Those that every rank must share, by name, as text: what the ranks compare when they meet.
  [[nodiscard]] StringMap agreed() const;
};

/// Resolve the options of a group: `overrides` (option name -> text, from pg_options) win over
/// `environment` (DISTRO_ variables; other names are ignored), which wins over the defaults. Throws
/// OptionError on an unknown DISTRO_ variable or option, a bad value, or one that is not available
/// yet. A transport that is given by path is loaded.
Options resolve_options(const StringMap& environment, const StringMap& overrides);

/// The DISTRO_ variables of this process.
StringMap distro_environment();

/// Name of a mode as the user writes it.
std::string_view name_of(Mode mode) noexcept;

}  // namespace distro::exchange
