// torch-distro-keygen: the files of keys for a group, or one participant's own.

#include <fmt/format.h>
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "transport/keys.h"

namespace {

using distro::transport::ConfigError;
using distro::transport::KeyPair;

constexpr int kMaxRanks = 4096;

struct Arguments {
  int ranks = 0;
  std::string single;
  std::string folder = ".";
  bool relay = false;
  std::vector<std::string> endpoints;  // WHO=tcp://...
  bool force = false;
  bool json = false;
};

// "rank0" or "relay", of the names in a peers file.
std::string file_of(const std::string& who) { return who == "relay" ? who : "rank" + who; }

std::string name_of(const std::string& who) { return who == "relay" ? "the relay" : "rank " + who; }

bool is_participant(const std::string& who, int ranks) {
  if (who == "relay") {
    return true;
  }
  int rank = 0;
  const auto [end, error] = std::from_chars(who.data(), who.data() + who.size(), rank);
  return error == std::errc{} && end == who.data() + who.size() && rank >= 0 && rank < ranks &&
         std::to_string(rank) == who;
}

std::map<std::string, std::string> parse_endpoints(const Arguments& arguments, int ranks) {
  std::map<std::string, std::string> endpoints;
  for (const auto& text : arguments.endpoints) {
    const auto equals = text.find('=');
    const std::string who = text.substr(0, equals);
    const std::string endpoint = equals == std::string::npos ? "" : text.substr(equals + 1);
    if (!is_participant(who, ranks) || !distro::transport::is_peer_endpoint(endpoint)) {
      throw ConfigError(fmt::format(
          "--endpoint {}: it is RANK=tcp://host, RANK=tcp://host:port or the same of `relay`, an "
          "IPv6 address in brackets, and the rank is one of those that get a key",
          text));
    }
    if (!endpoints.emplace(who, endpoint).second) {
      throw ConfigError(fmt::format("--endpoint {}: {} has one already", text, who));
    }
  }
  return endpoints;
}

// For this user alone: the secrets of a group may lie in it until they are handed out.
void make_folder(const std::string& folder) {
  if (::mkdir(folder.c_str(), S_IRWXU) != 0 && errno != EEXIST) {
    throw ConfigError(
        fmt::format("cannot make the directory {}: {}", folder, std::strerror(errno)));
  }
}

// Before the first is written, so that a refusal leaves nothing behind.
void refuse_existing(const std::vector<std::string>& paths) {
  for (const auto& path : paths) {
    std::error_code ignored;
    if (std::filesystem::symlink_status(path, ignored).type() !=
        std::filesystem::file_type::not_found) {
      throw ConfigError(fmt::format(
          "{} is there already, and a key that is in use would be lost: move it away, or give "
          "--force",
          path));
    }
  }
}

int make_group(const Arguments& arguments) {
  std::vector<std::string> participants;
  for (int rank = 0; rank < arguments.ranks; ++rank) {
    participants.push_back(std::to_string(rank));
  }
  if (arguments.relay) {
    participants.emplace_back("relay");
  }
  const auto endpoints = parse_endpoints(arguments, arguments.ranks);
  if (endpoints.contains("relay") && !arguments.relay) {
    throw ConfigError("--endpoint relay=... without --relay");
  }
  const auto path_of = [&](const std::string& name) { return arguments.folder + "/" + name; };
  const std::string peers = path_of("peers.txt");
  std::map<std::string, std::string> secret_of;
  std::vector<std::string> paths{peers};
  for (const auto& who : participants) {
    paths.push_back(secret_of[who] = path_of(file_of(who) + ".key"));
  }
  make_folder(arguments.folder);
  if (!arguments.force) {
    refuse_existing(paths);
  }
  std::string text = "# torch-distro: who takes part. The same file on every host.\n";
  nlohmann::json report{{"peers_file", peers}, {"participants", nlohmann::json::array()}};
  for (const auto& who : participants) {
    const KeyPair pair = distro::transport::make_key_pair();
    distro::transport::write_secret_file(secret_of[who], pair, name_of(who), arguments.force);
    const auto endpoint = endpoints.find(who);
    text += distro::transport::peers_line(who, pair.public_key,
                                          endpoint == endpoints.end() ? "" : endpoint->second);
    text += '\n';
    report["participants"].push_back(
        {{"who", who}, {"public_key", pair.public_key}, {"secret_file", secret_of[who]}});
  }
  distro::transport::write_peers_file(peers, text, arguments.force);
  if (arguments.json) {
    fmt::print("{}\n", report.dump(2));
    return 0;
  }
  fmt::print("{}\n", peers);
  for (const auto& who : participants) {
    fmt::print("{}\n", secret_of[who]);
  }
  fmt::print(
      stderr,
      "Give every host {} and its own rank's .key file, by a way that nobody else reads, and "
      "delete the\n.key files here that are not this host's. Then set on each "
      "DISTRO_CURVE_PEERS_FILE and\nDISTRO_CURVE_SECRET_FILE to the two paths.\n",
      peers);
  return 0;
}

int make_single(const Arguments& arguments) {
  const std::string& who = arguments.single;
  if (!is_participant(who, kMaxRanks)) {
    throw ConfigError(fmt::format("--single {}: it is the number of a rank, or `relay`", who));
  }
  const auto endpoints = parse_endpoints(arguments, kMaxRanks);
  if (endpoints.size() > (endpoints.contains(who) ? 1U : 0U)) {
    throw ConfigError(fmt::format("--endpoint of another than {}, whose key this is", who));
  }
  const std::string path = arguments.folder + "/" + file_of(who) + ".key";
  make_folder(arguments.folder);
  const KeyPair pair = distro::transport::make_key_pair();
  distro::transport::write_secret_file(path, pair, name_of(who), arguments.force);
  const std::string line = distro::transport::peers_line(
      who, pair.public_key, endpoints.empty() ? "" : endpoints.begin()->second);
  if (arguments.json) {
    const nlohmann::json report{
        {"who", who}, {"public_key", pair.public_key}, {"secret_file", path}, {"peers_line", line}};
    fmt::print("{}\n", report.dump(2));
    return 0;
  }
  fmt::print("{}\n", line);
  fmt::print(
      stderr,
      "The secret is in {}: keep it. The line above is for the peers file of everybody: send "
      "it by a way\non which nobody can change it.\n",
      path);
  return 0;
}

int run(int argc, char** argv) {
  Arguments arguments;
  CLI::App app{
      "Make the keys of a torch-distro group: with --ranks a file of each rank's secret and one of "
      "all public keys, with --single one's own secret and the public line for the others."};
  auto* ranks = app.add_option("--ranks", arguments.ranks, "Ranks of the group")
                    ->check(CLI::Range(1, kMaxRanks));
  auto* single = app.add_option("--single", arguments.single,
                                "Make one key only: the number of a rank, or `relay`")
                     ->excludes(ranks);
  app.add_option("--out", arguments.folder, "Directory for the files, made if need be")
      ->capture_default_str();
  app.add_flag("--relay", arguments.relay, "A key for a relay, too")->excludes(single);
  app.add_option("--endpoint", arguments.endpoints,
                 "Where peers dial a rank: RANK=tcp://host (the port as the rank tells it) or "
                 "RANK=tcp://host:port (of one group only); may be given several times")
      ->allow_extra_args(false);
  app.add_flag("--force", arguments.force, "Replace files that are there");
  app.add_flag("--json", arguments.json, "Print JSON instead of text (never a secret)");
  try {
    app.parse(argc, argv);
    if (arguments.ranks == 0 && arguments.single.empty()) {
      throw CLI::RequiredError("--ranks or --single");
    }
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  return arguments.single.empty() ? make_group(arguments) : make_single(arguments);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "torch-distro-keygen: {}\n", error.what());
    return 1;
  }
}
