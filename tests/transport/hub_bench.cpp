// What a rank uploads in one exchange, through a relay and to a mesh, by the number of ranks: all
// are in this process, and each sends one record to all others. `upload_per_record` is all that the
// carrier was given by rank 0 (headers, acknowledgements and the relay's wrapping included) over
// the record's size.
#include <benchmark/benchmark.h>

#include <thread>

#include "tests/transport/group.h"
#include "tests/transport/relay_thread.h"

namespace distro::transport::test {
namespace {

// A record of the quick start's model, and of GPT-2 small's weights (plugins_test, Gpt2).
constexpr std::int64_t kSmall = 2'000;
constexpr std::int64_t kGpt2 = 274'538;

// Exchanges are that far apart: at once, acknowledgements would ride on fewer frames than in a
// training.
constexpr milliseconds kStep{250};

void exchange(benchmark::State& state, bool hub) {
  const auto ranks = static_cast<int>(state.range(0));
  const auto bytes = static_cast<std::size_t>(state.range(1));
  RelayThread relay;
  Group group(Carrier::tcp, ranks, [&](ChannelConfig& options) {
    if (hub) {
      options.relay = relay.endpoint();
    }
    options.keepalive = std::chrono::seconds(5);  // as in a training
    options.timeout = std::chrono::seconds(120);
  });
  std::vector<std::vector<int>> others(static_cast<std::size_t>(ranks));
  for (int rank = 0; rank < ranks; ++rank) {
    for (int other = 0; other < ranks; ++other) {
      if (other != rank) {
        others[static_cast<std::size_t>(rank)].push_back(other);
      }
    }
  }
  const SharedBytes record = shared_pattern(bytes, 1);
  const auto once = [&] {
    for (int rank = 0; rank < ranks; ++rank) {
      group[rank].multicast(others[static_cast<std::size_t>(rank)], record);
    }
    for (int rank = 0; rank < ranks; ++rank) {
      for (const int peer : others[static_cast<std::size_t>(rank)]) {
        group[rank].receive(peer, in(std::chrono::seconds(120)));
      }
    }
  };
  once();  // all are connected
  std::this_thread::sleep_for(kStep);
  const auto before = group[0].counters().socket_bytes_sent;
  std::int64_t exchanges = 0;
  for ([[maybe_unused]] const auto& _ : state) {
    once();
    ++exchanges;
    state.PauseTiming();
    std::this_thread::sleep_for(kStep);
    state.ResumeTiming();
  }
  const auto sent = static_cast<double>(group[0].counters().socket_bytes_sent - before);
  state.counters["ranks"] = ranks;
  state.counters["record_bytes"] = static_cast<double>(bytes);
  state.counters["upload_per_record"] =
      sent / static_cast<double>(exchanges) / static_cast<double>(bytes);
  group.close_all();
}

void hub_upload(benchmark::State& state) { exchange(state, true); }
void mesh_upload(benchmark::State& state) { exchange(state, false); }

BENCHMARK(hub_upload)
    ->ArgsProduct({{2, 4, 8, 16, 32, 64}, {kSmall, kGpt2}})
    ->Iterations(8)
    ->UseRealTime();
BENCHMARK(mesh_upload)->ArgsProduct({{2, 4, 8}, {kGpt2}})->Iterations(8)->UseRealTime();

}  // namespace
}  // namespace distro::transport::test
