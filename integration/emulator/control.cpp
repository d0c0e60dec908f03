#include "integration/emulator/control.h"

#include <arpa/inet.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <utility>

namespace distro::emulator {
namespace {

using Json = nlohmann::json;

struct Setting {
  std::string_view name;
  double Line::*value;
  double most;
};

constexpr double kMostMilliseconds = 60'000;
constexpr std::array kSettings{
    Setting{"up_mbit", &Line::up_mbit, 1e6},
    Setting{"down_mbit", &Line::down_mbit, 1e6},
    Setting{"delay_ms", &Line::delay_ms, kMostMilliseconds},
    Setting{"jitter_ms", &Line::jitter_ms, kMostMilliseconds},
    Setting{"loss", &Line::loss, 1},
    Setting{"reorder", &Line::reorder, 1},
    Setting{"duplicate", &Line::duplicate, 1},
    Setting{"queue_ms", &Line::queue_ms, kMostMilliseconds},
    Setting{"queue_bytes", &Line::queue_bytes, 1e12},
};

struct Counter {
  const char* name;
  std::uint64_t Counters::*value;
};

constexpr std::array kCounters{
    Counter{"sent_packets", &Counters::sent_packets},
    Counter{"sent_bytes", &Counters::sent_bytes},
    Counter{"received_packets", &Counters::received_packets},
    Counter{"received_bytes", &Counters::received_bytes},
    Counter{"dropped_up", &Counters::dropped_up},
    Counter{"dropped_down", &Counters::dropped_down},
    Counter{"lost_up", &Counters::lost_up},
    Counter{"lost_down", &Counters::lost_down},
    Counter{"cut_up", &Counters::cut_up},
    Counter{"cut_down", &Counters::cut_down},
    Counter{"reordered", &Counters::reordered},
    Counter{"duplicated", &Counters::duplicated},
    Counter{"refused", &Counters::refused},
    Counter{"unroutable", &Counters::unroutable},
    Counter{"malformed", &Counters::malformed},
};

double number(const Json& value, std::string_view name, double most) {
  const double number = value.is_number() ? value.get<double>() : std::nan("");
  if (!(number >= 0 && number <= most)) {
    throw std::invalid_argument(
        fmt::format("\"{}\" is a number from 0 to {}, not {}", name, most, value.dump()));
  }
  return number;
}

std::size_t host_of(const Json& command, const char* name, const Network& network) {
  const auto found = command.find(name);
  if (found == command.end() || !found->is_number_unsigned() ||
      found->get<std::size_t>() >= network.size()) {
    throw std::invalid_argument(
        fmt::format("\"{}\" is the number of a host, from 0 to {}", name, network.size() - 1));
  }
  return found->get<std::size_t>();
}

void set(const Json& command, Network& network) {
  const std::size_t host = host_of(command, "host", network);
  Line line = network.line(host);
  std::optional<Address> address;
  for (const auto& [name, value] : command.items()) {
    const auto setting =
        std::find_if(kSettings.begin(), kSettings.end(),
                     [&, &wanted = name](const Setting& each) { return each.name == wanted; });
    if (setting != kSettings.end()) {
      line.*setting->value = number(value, name, setting->most);
    } else if (name == "nat" && value.is_boolean()) {
      line.nat = value.get<bool>();
    } else if (name == "address" && value.is_string()) {
      address = parse_address(value.get<std::string>());
    } else if (name != "do" && name != "host") {
      throw std::invalid_argument(fmt::format("\"{}\": {} is no setting", name, value.dump()));
    }
  }
  if (address) {
    network.set_address(host, *address);
  }
  network.set_line(host, line);
}

void cut(const Json& command, Network& network, Time now) {
  const std::size_t host = host_of(command, "host", network);
  const auto seconds = command.find("seconds");
  if (seconds == command.end()) {
    throw std::invalid_argument("\"seconds\" is missing");
  }
  constexpr double kMostSeconds = 86'400;
  const auto until = now + std::chrono::duration_cast<Time>(std::chrono::duration<double>(
                               number(*seconds, "seconds", kMostSeconds)));
  if (command.contains("peer")) {
    network.cut(host, host_of(command, "peer", network), until);
  } else {
    network.cut(host, until);
  }
}

Json counters(const Network& network) {
  Json hosts = Json::array();
  for (std::size_t host = 0; host < network.size(); ++host) {
    Json row;
    for (const auto& counter : kCounters) {
      row[counter.name] = network.counters(host).*counter.value;
    }
    hosts.push_back(std::move(row));
  }
  return {{"hosts", std::move(hosts)}};
}

Json answer(std::string_view text, Network& network, Time now) {
  const Json command = Json::parse(text);
  if (!command.is_object()) {
    throw std::invalid_argument("a command is an object");
  }
  const auto what = command.value("do", std::string());
  if (what == "counters") {
    return counters(network);
  }
  if (what == "set") {
    set(command, network);
  } else if (what == "cut") {
    cut(command, network, now);
  } else {
    throw std::invalid_argument(
        fmt::format("\"do\" is \"set\", \"cut\" or \"counters\", not \"{}\"", what));
  }
  return Json::object();
}

}  // namespace

std::string execute(std::string_view command, Network& network, Time now) {
  // Also where a text that is quoted in an error is no UTF-8.
  constexpr auto kReplace = Json::error_handler_t::replace;
  try {
    return answer(command, network, now).dump(-1, ' ', false, kReplace);
  } catch (const Json::exception& error) {
    return Json({{"error", error.what()}}).dump(-1, ' ', false, kReplace);
  } catch (const std::invalid_argument& error) {
    return Json({{"error", error.what()}}).dump(-1, ' ', false, kReplace);
  }
}

Address parse_address(const std::string& text) {
  in_addr address{};
  if (::inet_pton(AF_INET, text.c_str(), &address) != 1) {
    throw std::invalid_argument(fmt::format("\"{}\" is no IPv4 address", text));
  }
  return ntohl(address.s_addr);
}

}  // namespace distro::emulator
