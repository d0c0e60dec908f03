#include "tests/backend/exchange/transfers.h"

#include <gtest/gtest.h>

#include <random>
#include <thread>

namespace distro::exchange::testing {

TransferDone Ending::done() {
  return [promise = promise_](const std::exception_ptr& error) {
    error ? promise->set_exception(error) : promise->set_value(-1);
  };
}

std::function<void(int, const std::exception_ptr&)> Ending::done_by_sender() {
  return [promise = promise_](int from, const std::exception_ptr& error) {
    error ? promise->set_exception(error) : promise->set_value(from);
  };
}

int Ending::wait() {
  // A hang is a failure that says where.
  if (future_.wait_for(std::chrono::seconds(100)) != std::future_status::ready) {
    throw std::runtime_error("an operation hangs");
  }
  return future_.get();
}

bool Ending::is_over() const {
  return future_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

TransferRanks::TransferRanks(int ranks, const Tune& tune) {
  std::vector<transport::PeerAddress> addresses;
  for (int rank = 0; rank < ranks; ++rank) {
    transport::ChannelConfig config;
    config.rank = rank;
    config.world_size = ranks;
    config.group = 42;
    config.carrier = transport::Carrier::inproc;
    config.timeout = kLong;
    channels.push_back(transport::open_channel(config));
    addresses.push_back(channels.back()->address());
  }
  std::vector<int> members;
  for (int rank = 0; rank < ranks; ++rank) {
    members.push_back(rank);
    channels[static_cast<std::size_t>(rank)]->connect(addresses);
  }
  for (int rank = 0; rank < ranks; ++rank) {
    transport::Channel& channel = *channels[static_cast<std::size_t>(rank)];
    Transfers::Config config;
    config.rank = rank;
    config.world_size = ranks;
    config.on_failure = [&channel](int culprit, std::string_view reason) {
      try {
        channel.abort(culprit, reason);
      } catch (const transport::TransportError&) {
        // it is closed
      }
    };
    if (tune) {
      tune(config);
    }
    transfers.push_back(std::make_unique<Transfers>(channel, std::move(config)));
    transfers.back()->open(0, members);
    transfers.back()->open(1, members);
  }
}

TransferRanks::~TransferRanks() {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size(); ++rank) {
    threads.emplace_back([this, rank] { close(rank); });
  }
  for (auto& thread : threads) {
    thread.join();
  }
}

void TransferRanks::close(int rank) {
  transfers[static_cast<std::size_t>(rank)]->close();
  channels[static_cast<std::size_t>(rank)]->close(transport::Clock::now() +
                                                  std::chrono::seconds(10));
}

std::vector<std::string> TransferRanks::each(const std::function<void(int, Transfers&)>& body) {
  std::vector<std::string> errors(channels.size());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size(); ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(rank, (*this)[rank]);
      } catch (const std::exception& error) {
        errors[static_cast<std::size_t>(rank)] = error.what();
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  return errors;
}

void TransferRanks::expect_each(const std::function<void(int, Transfers&)>& body) {
  EXPECT_EQ(each(body), std::vector<std::string>(channels.size()));
}

std::vector<std::byte> pattern(std::size_t size, std::uint64_t seed) {
  std::vector<std::byte> bytes(size);
  std::minstd_rand random(static_cast<std::uint32_t>(seed * 7919 + 1));
  for (auto& byte : bytes) {
    byte = static_cast<std::byte>(random());
  }
  return bytes;
}

namespace {

std::vector<int> others(const Transfers& transfers, int ranks) {
  std::vector<int> peers;
  for (int peer = 0; peer < ranks; ++peer) {
    if (peer != transfers.rank()) {
      peers.push_back(peer);
    }
  }
  return peers;
}

}  // namespace

Ending all_gather(Transfers& transfers, int ranks, const std::vector<std::byte>& own,
                  std::vector<std::vector<std::byte>>& all, std::uint32_t stream,
                  std::chrono::milliseconds timeout) {
  Ending ending;
  Collective collective;
  collective.stream = stream;
  collective.what = {.operation = TransferOperation::all_gather, .elements = own.size()};
  collective.timeout = timeout;
  collective.done = ending.done();
  all.assign(static_cast<std::size_t>(ranks), std::vector<std::byte>(own.size()));
  all[static_cast<std::size_t>(transfers.rank())] = own;
  collective.outgoing.push_back({own, others(transfers, ranks)});
  for (const int peer : others(transfers, ranks)) {
    collective.incoming.push_back(
        {.from = peer, .bytes = own.size(), .into = all[static_cast<std::size_t>(peer)].data()});
  }
  transfers.issue(std::move(collective));
  return ending;
}

Ending all_reduce(Transfers& transfers, int ranks, std::vector<std::int32_t>& values,
                  std::chrono::milliseconds timeout) {
  Ending ending;
  const auto own = std::as_writable_bytes(std::span(values));
  Collective collective;
  collective.what = {.operation = TransferOperation::all_reduce,
                     .type = ElementType::i32,
                     .combiner = Combiner::sum,
                     .elements = values.size()};
  collective.timeout = timeout;
  collective.done = ending.done();
  collective.outgoing.push_back({own, others(transfers, ranks)});
  for (const int peer : others(transfers, ranks)) {
    collective.incoming.push_back({.from = peer, .bytes = own.size()});
  }
  collective.reduction = {own, own.data()};
  transfers.issue(std::move(collective));
  return ending;
}

Ending barrier(Transfers& transfers, std::chrono::milliseconds timeout) {
  Ending ending;
  Collective collective;
  collective.timeout = timeout;
  collective.done = ending.done();
  transfers.issue(std::move(collective));
  return ending;
}

Ending send(Transfers& transfers, int to, const std::vector<std::byte>& bytes, std::uint32_t tag,
            std::chrono::milliseconds timeout) {
  Ending ending;
  transfers.send({.to = to, .tag = tag, .bytes = bytes, .timeout = timeout, .done = ending.done()});
  return ending;
}

Ending want(Transfers& transfers, std::optional<int> from, std::vector<std::byte>& into,
            std::uint32_t tag, std::chrono::milliseconds timeout) {
  Ending ending;
  transfers.want({.from = from,
                  .tag = tag,
                  .into = into,
                  .timeout = timeout,
                  .done = ending.done_by_sender()});
  return ending;
}

}  // namespace distro::exchange::testing
