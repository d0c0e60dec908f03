// torch-distro-relay: the hub of DISTRO_TOPOLOGY=hub. Needs neither Python nor torch.

#include <fmt/format.h>
#include <signal.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <thread>

#include "transport/bind.h"
#include "transport/keys.h"
#include "transport/log.h"
#include "transport/relay.h"

namespace {

using distro::transport::LogLevel;
using distro::transport::Relay;
using distro::transport::RelayConfig;
using distro::transport::RelayCounters;

std::atomic<bool> stop{false};  // set by signals, which reach nothing else

void on_signal(int /*number*/) { stop = true; }

void print(const nlohmann::ordered_json& line) {
  std::puts(line.dump().c_str());
  std::fflush(stdout);
}

nlohmann::ordered_json to_json(const RelayCounters& counters) {
  return {{"groups", counters.groups},
          {"ranks", counters.ranks},
          {"bytes_received", counters.bytes_received},
          {"bytes_sent", counters.bytes_sent},
          {"frames", counters.frames},
          {"dropped_frames", counters.dropped_frames},
          {"rejected_frames", counters.rejected_frames},
          {"refused_joins", counters.refused_joins},
          {"rejected_connections", counters.rejected_connections}};
}

std::string text(const RelayCounters& counters) {
  return fmt::format(
      "{} ranks in {} groups; {:.1f} MB in, {:.1f} MB out, {} frames, {} dropped (and sent again), "
      "{} rejected, {} joins and {} connections refused",
      counters.ranks, counters.groups, static_cast<double>(counters.bytes_received) / 1e6,
      static_cast<double>(counters.bytes_sent) / 1e6, counters.frames, counters.dropped_frames,
      counters.rejected_frames, counters.refused_joins, counters.rejected_connections);
}

// Tells what goes on every so many seconds, until the end.
class Reporter {
 public:
  Reporter(const Relay& relay, unsigned seconds, bool json)
      : thread_([&relay, seconds, json] {
          using Clock = std::chrono::steady_clock;
          auto next = Clock::now() + std::chrono::seconds(seconds);
          while (!stop) {
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            if (seconds > 0 && Clock::now() >= next) {
              next += std::chrono::seconds(seconds);
              tell(relay, json);
            }
          }
        }) {}
  ~Reporter() {
    stop = true;
    thread_.join();
  }
  Reporter(const Reporter&) = delete;
  Reporter& operator=(const Reporter&) = delete;

  static void tell(const Relay& relay, bool json) {
    if (json) {
      auto line = to_json(relay.counters());
      line["event"] = "counters";
      print(line);
    } else {
      distro::transport::log(LogLevel::info, "[distro relay] " + text(relay.counters()));
    }
  }

 private:
  std::thread thread_;
};

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{
      "The relay of torch-distro's hub topology (DISTRO_TOPOLOGY=hub): ranks dial it, upload each "
      "message once, and need no open port. It keeps nothing but what waits for a connection.",
      "torch-distro relay"};
  std::string bind = "tcp://127.0.0.1:29600";
  RelayConfig config;
  unsigned seconds = 60;
  bool json = false;
  std::string level = "info";
  app.add_option("--bind", bind, "endpoint to listen at, tcp://ADDRESS:PORT; port 0: any")
      ->capture_default_str();
  std::string secret;
  std::vector<std::string> peers;
  app.add_option("--secret", secret, "the relay's own .key file (torch-distro keygen --relay)");
  app.add_option("--peers", peers, "the peers file of a run that it serves; once for each run");
  app.add_flag("--insecure", config.insecure,
               "listen beyond loopback without keys: on a trusted network only");
  app.add_option("--max-ranks", config.max_ranks, "ranks of all groups together")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 20));
  app.add_option("--queue-frames", config.queue_frames,
                 "frames of up to 64 KiB that may wait for one rank")
      ->capture_default_str()
      ->check(CLI::Range(64, 1 << 20));
  app.add_option("--report-seconds", seconds, "how often to tell what goes on; 0: never")
      ->capture_default_str();
  app.add_option("--log", level, "error, warning, info, debug")
      ->capture_default_str()
      ->check(CLI::IsMember({"error", "warning", "info", "debug"}));
  app.add_flag("--json", json, "print events and counters as lines of JSON");
  CLI11_PARSE(app, argc, argv);

  distro::transport::set_log_level(level == "error"     ? LogLevel::error
                                   : level == "warning" ? LogLevel::warning
                                   : level == "debug"   ? LogLevel::debug
                                                        : LogLevel::info);
  struct sigaction action {};
  action.sa_handler = on_signal;
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
  try {
    const auto parts = distro::transport::split_endpoint(bind, /*any_port=*/true);
    if (!parts) {
      throw distro::transport::ConfigError(
          fmt::format("--bind {} is no endpoint: tcp://ADDRESS:PORT", bind));
    }
    config.bind_address = parts->host;
    config.port = parts->port;
    if (secret.empty() != peers.empty()) {
      throw distro::transport::ConfigError("keys need both --secret and --peers");
    }
    for (const std::string& file : peers) {
      config.runs.push_back(distro::transport::load_relay_keys(secret, file));
    }
    Relay relay(config);
    if (json) {
      print({{"event", "listening"}, {"endpoint", relay.endpoint()}});
    } else {
      distro::transport::log(LogLevel::info,
                             fmt::format("[distro relay] listening at {}", relay.endpoint()));
    }
    const Reporter reporter(relay, seconds, json);
    relay.run(stop);
    Reporter::tell(relay, json);
  } catch (const std::exception& error) {
    fmt::print(stderr, "torch-distro relay: {}\n", error.what());
    return 1;
  }
  return 0;
}
