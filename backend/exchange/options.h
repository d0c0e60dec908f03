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
#include "plugins/gradient.h"
#include "transport/channel.h"
#include "transport/log.h"
#include "transport/plugin.h"

namespace distro::exchange {

/// auto: weights where a wrapped module is found, exact elsewhere. ef, demo: gradient reductions
/// are compressed, all else exact.
enum class Mode : std::uint8_t { automatic, weights, ef, demo, dense };

/// Whether gradients cross the wire, compressed, in place of weights.
[[nodiscard]] constexpr bool exchanges_gradients(Mode mode) noexcept {
  return mode == Mode::ef || mode == Mode::demo;
}

/// What runs exact collectives on the host: Gloo, or the group's own transport (docs/adr/0016).
enum class Exact : std::uint8_t { automatic, gloo, transport };

using StringMap = std::map<std::string, std::string, std::less<>>;

/// The options of one process group, resolved and checked. README.md, "Options", lists them for
/// users.
struct Options {
  Mode mode = Mode::automatic;
  std::uint32_t k = 10;                       ///< Entries kept per 4096 weights; 6 of gradients.
  std::optional<double> gain;                 ///< Empty: by the optimizer's class.
  std::optional<double> share;                ///< Empty: plugins::default_share().
  std::optional<std::uint32_t> turns_given;   ///< Empty: by k (turns()).
  std::optional<std::uint32_t> spread_given;  ///< Empty: by k (spread_steps()).
  std::uint32_t value_bits = 1;               ///< 1 or 32.
  std::uint32_t residual_bits = 32;           ///< weights: 32 or 16.
  int delay = 1;                              ///< Steps that an exchange may travel: 0 or 1.
  std::string site;                           ///< A label, "host", or empty: ranks that act as one.
  std::uint64_t min_elements = 4096;          ///< ef, demo: smallest reduction that is compressed.
  plugins::Transform transform = plugins::Transform::dct;  ///< ef, demo.
  std::optional<double> beta;  ///< ef, demo: decay of the residual; empty: 1 in ef, 0.999 in demo.
  bool compress_reduce_scatter = false;  ///< ef, demo: reduce-scatters, too, are compressed.
  Exact exact = Exact::automatic;
  transport::Carrier carrier = transport::Carrier::tcp;
  std::shared_ptr<const transport::Plugin> plugin;  ///< Carrier::plugin: the loaded library.
  bool hub = false;                                 ///< Everything goes by the relay.
  std::string relay;                                ///< hub: its endpoint.
  std::uint64_t rate_limit_bytes = 0;               ///< A second, for all groups; 0: none.
  std::string bind;                                 ///< Empty: what the store's route shows.
  std::string advertise;
  std::uint16_t first_port = 0;
  std::uint16_t last_port = 0;
  std::string curve_secret_file;  ///< With the next, or both empty: no keys.
  std::string curve_peers_file;
  bool insecure = false;
  int threads = 0;  ///< 0: cores / local ranks.
  std::string stats_path;
  transport::LogLevel log_level = transport::LogLevel::warning;
  kernels::Isa isa = kernels::Isa::scalar;

  /// How many turns the weights of a module take: of so many exchanges each looks at another part.
  [[nodiscard]] std::size_t turns() const noexcept;

  /// Over how many steps comes what a gain adds to the mean of the moves (plugins::Spread).
  [[nodiscard]] std::uint32_t spread_steps() const noexcept;

  [[nodiscard]] bool has_keys() const noexcept { return !curve_secret_file.empty(); }

  /// Those that every rank must share, by name, as text: what the ranks compare when they meet.
  [[nodiscard]] StringMap agreed() const;

  /// Exact collectives run over the group's own transport, and neither Gloo nor NCCL connects.
  [[nodiscard]] bool own_transport() const noexcept;

  /// What the codec of a gradient reduction needs to know (modes ef and demo).
  [[nodiscard]] plugins::GradientConfig gradient_config() const;
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
