#include "backend/exchange/options.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>
#include <span>
#include <vector>

#include "backend/exchange/sites.h"
#include "backend/exchange/text.h"
#include "plugins/weights_defaults.h"
#include "transport/bind.h"

extern char** environ;  // NOLINT(readability-redundant-declaration): POSIX declares it in no header

namespace distro::exchange {
namespace {

using transport::Carrier;
using transport::LogLevel;

// Thrown by a parser; the caller adds the option's name and what is allowed.
struct BadValue {};

// Lower: what keeps the ranks connected would not fit.
constexpr std::uint64_t kLeastRate = 1000;

// As the default of weights, as many as 857 times fewer bytes than in bf16 allow (docs/protocol.md,
// 4); gradients take no turns, so that an index costs more bits.
constexpr std::uint32_t kDefaultKOfGradients = 6;

// More: weights are looked at so seldom that what a participant moved in between is news of long
// ago.
constexpr std::uint32_t kMostTurns = 64;

// More: a training would end before what its exchanges have given has come.
constexpr std::uint32_t kMostSpreadSteps = 10000;

// Of a name or value that is no text, in an error text, in bytes.
constexpr std::size_t kMaxShownValue = 200;

template <typename Number>
Number number(std::string_view text, Number least, Number most) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || !(value >= least) ||
      !(value <= most)) {
    throw BadValue{};
  }
  return value;
}

template <typename Value>
Value choice(std::string_view text, std::span<const std::pair<std::string_view, Value>> values) {
  const auto found = std::ranges::find(values, text, &std::pair<std::string_view, Value>::first);
  if (found == values.end()) {
    throw BadValue{};
  }
  return found->second;
}

template <class Number>
Number one_of_two(std::string_view text, Number less, Number more) {
  const auto value = number<Number>(text, less, more);
  if (value != less && value != more) {
    throw BadValue{};
  }
  return value;
}

bool flag(std::string_view text) {
  static constexpr std::pair<std::string_view, bool> kValues[] = {{"0", false}, {"1", true}};
  return choice<bool>(text, kValues);
}

Mode mode(std::string_view text) {
  static constexpr std::pair<std::string_view, Mode> kValues[] = {{"auto", Mode::automatic},
                                                                  {"weights", Mode::weights},
                                                                  {"ef", Mode::ef},
                                                                  {"demo", Mode::demo},
                                                                  {"dense", Mode::dense}};
  return choice<Mode>(text, kValues);
}

std::string_view site(std::string_view text) {
  if (!is_site(text)) {
    throw BadValue{};
  }
  return text;
}

bool is_hub(std::string_view text) {
  static constexpr std::pair<std::string_view, bool> kValues[] = {{"mesh", false}, {"hub", true}};
  return choice<bool>(text, kValues);
}

std::string relay(std::string_view text) {
  std::string endpoint(text);
  if (!transport::split_endpoint(endpoint)) {
    throw BadValue{};
  }
  return endpoint;
}

plugins::Transform transform(std::string_view text) {
  static constexpr std::pair<std::string_view, plugins::Transform> kValues[] = {
      {"dct", plugins::Transform::dct}, {"none", plugins::Transform::none}};
  return choice<plugins::Transform>(text, kValues);
}

bool compresses(std::string_view text) {
  static constexpr std::pair<std::string_view, bool> kValues[] = {{"exact", false},
                                                                  {"compress", true}};
  return choice<bool>(text, kValues);
}

Exact exact(std::string_view text) {
  static constexpr std::pair<std::string_view, Exact> kValues[] = {
      {"auto", Exact::automatic}, {"gloo", Exact::gloo}, {"transport", Exact::transport}};
  return choice<Exact>(text, kValues);
}

// A name, or the path of a third-party transport.
void transport_option(Options& options, std::string_view text) {
  options.plugin = nullptr;
  if (text.find('/') != std::string_view::npos) {
    options.carrier = Carrier::plugin;
    try {
      options.plugin = transport::Plugin::load(std::string(text));
    } catch (const transport::ConfigError& error) {
      throw OptionError(error.what());
    }
    return;
  }
  static constexpr std::pair<std::string_view, Carrier> kValues[] = {
      {"tcp", Carrier::tcp}, {"ipc", Carrier::ipc}, {"inproc", Carrier::inproc}};
  options.carrier = choice<Carrier>(text, kValues);
}

kernels::Isa isa(std::string_view text) {
  static constexpr std::pair<std::string_view, kernels::Isa> kValues[] = {
      {"scalar", kernels::Isa::scalar},
      {"avx2", kernels::Isa::avx2},
      {"avx512", kernels::Isa::avx512}};
  if (text == "auto") {
    return kernels::best_isa();
  }
  const auto wanted = choice<kernels::Isa>(text, kValues);
  if (kernels::table(wanted).isa != wanted) {
    throw OptionError(fmt::format(
        "DISTRO_ISA={}: this CPU does not have that instruction set; use DISTRO_ISA=auto.", text));
  }
  return wanted;
}

LogLevel log_level(std::string_view text) {
  static constexpr std::pair<std::string_view, LogLevel> kValues[] = {
      {"warning", LogLevel::warning},
      {"info", LogLevel::info},
      {"debug", LogLevel::debug},
      {"error", LogLevel::error}};
  return choice<LogLevel>(text, kValues);
}

// "a-b" or one port.
void ports(Options& options, std::string_view text) {
  const auto dash = text.find('-');
  options.first_port = number<std::uint16_t>(text.substr(0, dash), 1, 65535);
  options.last_port = dash == std::string_view::npos
                          ? options.first_port
                          : number<std::uint16_t>(text.substr(dash + 1), 1, 65535);
  if (options.last_port < options.first_port) {
    throw BadValue{};
  }
}

// Modes in which an option for experts means something; in the others it is a mistake to give it.
// The variables are lenient: they may be set for several programs.
using Modes = std::span<const Mode>;
constexpr Mode kAllModes[] = {Mode::automatic, Mode::weights, Mode::ef, Mode::demo, Mode::dense};
constexpr Mode kCompressing[] = {Mode::automatic, Mode::weights, Mode::ef, Mode::demo};
constexpr Mode kOfWeights[] = {Mode::automatic, Mode::weights};
constexpr Mode kOfGradients[] = {Mode::ef, Mode::demo};

struct Entry {
  std::string_view name;  // of the option; the variable is DISTRO_<NAME>, if it has one
  bool has_variable;
  std::string_view allowed;
  std::function<void(Options&, std::string_view)> set;
  Modes modes = kAllModes;
};

// The one table of options: parsing, error texts and the list of known names all come from it.
const std::vector<Entry>& entries() {
  static const std::vector<Entry> kEntries = {
      {"mode", true, "auto, weights, ef, demo, dense",
       [](Options& o, std::string_view t) { o.mode = mode(t); }},
      {"k", true, "a whole number from 1 to 4096",
       [](Options& o, std::string_view t) { o.k = number<std::uint32_t>(t, 1, 4096); }},
      {"gain", true, "auto, or a number above 0 and at most 1000",
       [](Options& o, std::string_view t) {
         o.gain = t == "auto" ? std::optional<double>{} : number<double>(t, 1e-6, 1e3);
       }},
      {"delay", true, "1, 0",
       [](Options& o, std::string_view t) { o.delay = number<int>(t, 0, 1); }},
      {"site", true, "host, or a label of up to 64 letters, digits, '.', '_' and '-'",
       [](Options& o, std::string_view t) { o.site = site(t); }},
      {"transport", true, "tcp, ipc, inproc, or the path of a shared library, with a /",
       transport_option},
      {"min_elements", true, "a whole number from 1 to 2^40",
       [](Options& o, std::string_view t) {
         o.min_elements = number<std::uint64_t>(t, 1, std::uint64_t{1} << 40);
       },
       kOfGradients},
      {"topology", true, "mesh, hub", [](Options& o, std::string_view t) { o.hub = is_hub(t); }},
      {"relay", true, "the relay's endpoint, tcp://host:port",
       [](Options& o, std::string_view t) { o.relay = relay(t); }},
      {"bind", true, "an address or interface of this machine",
       [](Options& o, std::string_view t) { o.bind = t; }},
      {"advertise", true, "a host name or address",
       [](Options& o, std::string_view t) { o.advertise = t; }},
      {"ports", true, "a port or a range such as 40000-40100", ports},
      {"curve_secret_file", true, "the path of this rank's .key file",
       [](Options& o, std::string_view t) { o.curve_secret_file = t; }},
      {"curve_peers_file", true, "the path of the peers file",
       [](Options& o, std::string_view t) { o.curve_peers_file = t; }},
      {"insecure", true, "0, 1", [](Options& o, std::string_view t) { o.insecure = flag(t); }},
      {"threads", true, "a whole number from 1 to 1024",
       [](Options& o, std::string_view t) { o.threads = number<int>(t, 1, 1024); }},
      {"rate_limit", true, "bytes a second, a whole number from 1000 to 10^12",
       [](Options& o, std::string_view t) {
         o.rate_limit_bytes = number<std::uint64_t>(t, kLeastRate, 1'000'000'000'000);
       }},
      {"stats", true, "a path", [](Options& o, std::string_view t) { o.stats_path = t; }},
      {"log", true, "warning, info, debug, error",
       [](Options& o, std::string_view t) { o.log_level = log_level(t); }},
      // Acts when torch is imported (bindings/torch_distro/_default.py); only checked here.
      {"default", true, "0, 1", [](Options&, std::string_view t) { static_cast<void>(flag(t)); }},
      {"isa", true, "auto, scalar, avx2, avx512",
       [](Options& o, std::string_view t) { o.isa = isa(t); }},
      {"value_bits", false, "1, 32",
       [](Options& o, std::string_view t) { o.value_bits = one_of_two<std::uint32_t>(t, 1, 32); },
       kCompressing},
      {"residual_bits", false, "16, 32",
       [](Options& o, std::string_view t) {
         o.residual_bits = one_of_two<std::uint32_t>(t, 16, 32);
       },
       kOfWeights},
      {"share", false, "auto, or a number from 0 to 1",
       [](Options& o, std::string_view t) {
         o.share = t == "auto" ? std::optional<double>{} : number<double>(t, 0.0, 1.0);
       },
       kOfWeights},
      {"turns", false, "auto, or a whole number from 1 to 64",
       [](Options& o, std::string_view t) {
         o.turns_given =
             t == "auto" ? std::optional<std::uint32_t>{} : number<std::uint32_t>(t, 1, kMostTurns);
       },
       kOfWeights},
      {"spread", false, "auto, or a whole number of steps from 0 to 10000",
       [](Options& o, std::string_view t) {
         o.spread_given = t == "auto" ? std::optional<std::uint32_t>{}
                                      : number<std::uint32_t>(t, 0, kMostSpreadSteps);
       },
       kOfWeights},
      {"transform", false, "dct, none",
       [](Options& o, std::string_view t) { o.transform = transform(t); }, kOfGradients},
      {"beta", false, "a number from 0 to 1",
       [](Options& o, std::string_view t) { o.beta = number<double>(t, 0.0, 1.0); }, kOfGradients},
      {"reduce_scatter", false, "exact, compress",
       [](Options& o, std::string_view t) { o.compress_reduce_scatter = compresses(t); },
       kOfGradients},
      {"exact", false, "auto, gloo, transport",
       [](Options& o, std::string_view t) { o.exact = exact(t); }},
  };
  return kEntries;
}

std::string variable_of(const Entry& entry) {
  std::string name = "DISTRO_";
  for (const char c : entry.name) {
    name += static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c);
  }
  return name;
}

void set(Options& options, const Entry& entry, std::string_view shown, std::string_view text) {
  if (!is_utf8(text)) {
    throw OptionError(fmt::format("{}={} is not UTF-8 text. Allowed: {}.", shown,
                                  printable(text, kMaxShownValue), entry.allowed));
  }
  try {
    entry.set(options, text);
  } catch (const BadValue&) {
    throw OptionError(
        fmt::format("{}={} is not allowed. Allowed: {}.", shown, text, entry.allowed));
  }
}

void check_mode(const Entry& entry, Mode mode) {
  if (std::ranges::find(entry.modes, mode) != entry.modes.end()) {
    return;
  }
  std::vector<std::string_view> names;
  for (const Mode other : entry.modes) {
    names.push_back(name_of(other));
  }
  throw OptionError(fmt::format(
      "Options({0}) means nothing in mode {1}; it belongs to mode {2}. Leave it out, or "
      "choose such a mode.",
      entry.name, name_of(mode), fmt::join(names, ", ")));
}

void check_keys(const Options& options) {
  if (options.curve_secret_file.empty() != options.curve_peers_file.empty()) {
    throw OptionError(fmt::format(
        "DISTRO_CURVE_{} is set and DISTRO_CURVE_{} is not: keys need both, this rank's own and "
        "the file that says who takes part (`torch-distro keygen` makes them). Set both, or none.",
        options.curve_secret_file.empty() ? "PEERS_FILE" : "SECRET_FILE",
        options.curve_secret_file.empty() ? "SECRET_FILE" : "PEERS_FILE"));
  }
  if (options.has_keys() && options.carrier != Carrier::tcp) {
    throw OptionError(fmt::format(
        "DISTRO_CURVE_SECRET_FILE is set with DISTRO_TRANSPORT={}: keys protect tcp. {} Unset "
        "DISTRO_CURVE_SECRET_FILE and DISTRO_CURVE_PEERS_FILE, or use DISTRO_TRANSPORT=tcp.",
        options.agreed().at("transport"),
        options.carrier == Carrier::plugin
            ? "A transport that is given by path has to protect itself."
            : "What it sends does not leave the host, where only this user can read it."));
  }
}

}  // namespace

Options resolve_options(const StringMap& environment, const StringMap& overrides) {
  Options options;
  options.isa = kernels::best_isa();
  for (const auto& setting : environment) {
    const std::string& variable = setting.first;
    const std::string& text = setting.second;
    if (!variable.starts_with("DISTRO_")) {
      continue;
    }
    const auto found = std::ranges::find_if(
        entries(), [&](const Entry& e) { return e.has_variable && variable_of(e) == variable; });
    if (found == entries().end()) {
      std::vector<std::string> known;
      for (const auto& entry : entries()) {
        if (entry.has_variable) {
          known.push_back(variable_of(entry));
        }
      }
      throw OptionError(
          fmt::format("{} is not a variable of torch-distro (a misspelling?). Known: {}. "
                      "Unset it or correct its name.",
                      printable(variable, kMaxShownValue), fmt::join(known, ", ")));
    }
    set(options, *found, variable, text);
  }
  for (const auto& [name, text] : overrides) {
    const auto found = std::ranges::find(entries(), name, &Entry::name);
    if (found == entries().end()) {
      std::vector<std::string_view> known;
      for (const auto& entry : entries()) {
        known.push_back(entry.name);
      }
      throw OptionError(fmt::format("{} is not an option of torch_distro.Options. Known: {}.", name,
                                    fmt::join(known, ", ")));
    }
    set(options, *found, fmt::format("Options({})", name), text);
  }
  if (exchanges_gradients(options.mode) && !environment.contains("DISTRO_K") &&
      !overrides.contains("k")) {
    options.k = kDefaultKOfGradients;
  }
  if (!options.site.empty() && exchanges_gradients(options.mode)) {
    throw OptionError(
        fmt::format("DISTRO_SITE={}: ranks act as one site in mode weights (or auto) only, not in "
                    "mode {}. Unset it, or choose another mode.",
                    options.site, name_of(options.mode)));
  }
  if (options.hub && options.relay.empty()) {
    throw OptionError(
        "DISTRO_TOPOLOGY=hub needs DISTRO_RELAY=tcp://host:port, the endpoint of a `torch-distro "
        "relay` that all ranks can reach.");
  }
  if (!options.hub && !options.relay.empty()) {
    throw OptionError(fmt::format(
        "DISTRO_RELAY={} is used with DISTRO_TOPOLOGY=hub only. Set that, or unset DISTRO_RELAY.",
        options.relay));
  }
  if (options.hub && options.carrier != Carrier::tcp) {
    throw OptionError(
        "DISTRO_TOPOLOGY=hub needs DISTRO_TRANSPORT=tcp: a relay is reached over TCP. Unset one of "
        "the two.");
  }
  check_keys(options);
  if (options.exact == Exact::gloo && (options.hub || options.has_keys())) {
    throw OptionError(
        "Options(exact)=gloo with a hub or keys: Gloo connects every rank with every other, in the "
        "clear. Leave it out, and exact collectives go the way of everything else.");
  }
  for (const auto& setting : overrides) {
    check_mode(*std::ranges::find(entries(), setting.first, &Entry::name), options.mode);
  }
  return options;
}

StringMap distro_environment() {
  StringMap variables;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const auto equals = text.find('=');
    if (text.starts_with("DISTRO_") && equals != std::string_view::npos) {
      variables.emplace(text.substr(0, equals), text.substr(equals + 1));
    }
  }
  return variables;
}

std::string_view name_of(Mode mode) noexcept {
  switch (mode) {
    case Mode::automatic:
      return "auto";
    case Mode::weights:
      return "weights";
    case Mode::ef:
      return "ef";
    case Mode::demo:
      return "demo";
    case Mode::dense:
      return "dense";
  }
  return "unknown";
}

bool Options::own_transport() const noexcept {
  return exact == Exact::transport || (exact == Exact::automatic && (hub || has_keys()));
}

std::size_t Options::turns() const noexcept {
  return turns_given ? *turns_given : plugins::default_turns(k);
}

std::uint32_t Options::spread_steps() const noexcept {
  return spread_given ? *spread_given : plugins::default_spread_steps(k, delay);
}

plugins::GradientConfig Options::gradient_config() const {
  // DeMo's own decay; with error feedback nothing is forgotten.
  const double decay = beta.value_or(mode == Mode::demo ? 0.999 : 1.0);
  return {
      .method = mode == Mode::demo ? plugins::GradientMethod::demo : plugins::GradientMethod::ef,
      .k = k,
      .value_bits = value_bits,
      .transform = transform,
      .beta = static_cast<float>(decay),
      .isa = isa};
}

StringMap Options::agreed() const {
  const auto text = [](const std::optional<double>& value) {
    return value ? fmt::format("{}", *value) : std::string("auto");
  };
  static constexpr std::string_view kCarriers[] = {"tcp", "ipc", "inproc"};
  // Paths may differ from host to host; what is at their ends must not.
  const std::string carried =
      plugin ? plugin->identity() : std::string(kCarriers[static_cast<std::size_t>(carrier)]);
  return {{"mode", std::string(name_of(mode))},
          {"k", std::to_string(k)},
          {"gain", text(gain)},
          {"share", text(share)},
          {"turns", std::to_string(turns())},
          {"spread", std::to_string(spread_steps())},
          {"value_bits", std::to_string(value_bits)},
          {"residual_bits", std::to_string(residual_bits)},
          {"delay", std::to_string(delay)},
          {"min_elements", std::to_string(min_elements)},
          {"transform", transform == plugins::Transform::dct ? "dct" : "none"},
          {"beta", beta ? fmt::format("{}", *beta) : "default"},
          {"reduce_scatter", compress_reduce_scatter ? "compress" : "exact"},
          {"exact", own_transport() ? "transport" : "gloo"},
          {"topology", hub ? "hub" : "mesh"},
          {"transport", carried},
          {"keys", has_keys() ? "1" : "0"}};
}

}  // namespace distro::exchange
