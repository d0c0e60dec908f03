#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "backend/exchange/transfers.h"
#include "transport/channel.h"

namespace distro::exchange::testing {

/// How an operation of a test ended; its thread waits for it here.
class Ending {
 public:
  [[nodiscard]] TransferDone done();
  [[nodiscard]] std::function<void(int from, const std::exception_ptr& error)> done_by_sender();
  /// Throws what the operation failed with. Returns who sent it (of a wanted message).
  int wait();
  [[nodiscard]] bool is_over() const;

 private:
  std::shared_ptr<std::promise<int>> promise_ = std::make_shared<std::promise<int>>();
  std::shared_future<int> future_ = promise_->get_future().share();
};

/// Ranks that are threads, each with a Transfers over an inproc channel.
class TransferRanks {
 public:
  using Tune = std::function<void(Transfers::Config&)>;
  explicit TransferRanks(int ranks, const Tune& tune = {});
  ~TransferRanks();
  TransferRanks(const TransferRanks&) = delete;
  TransferRanks& operator=(const TransferRanks&) = delete;

  [[nodiscard]] int size() const { return static_cast<int>(channels.size()); }
  Transfers& operator[](int rank) { return *transfers[static_cast<std::size_t>(rank)]; }
  /// Run `body` as each rank; what each threw (empty: nothing).
  std::vector<std::string> each(const std::function<void(int rank, Transfers& transfers)>& body);
  /// The same, and fail the test if any threw.
  void expect_each(const std::function<void(int rank, Transfers& transfers)>& body);
  /// The rank ends: everything is delivered, and a goodbye said.
  void close(int rank);

  std::vector<std::unique_ptr<transport::Channel>> channels;
  std::vector<std::unique_ptr<Transfers>> transfers;
};

/// Bytes that depend on the seed.
std::vector<std::byte> pattern(std::size_t size, std::uint64_t seed);

inline constexpr std::chrono::milliseconds kLong{60'000};

/// An all-gather, begun: `all` holds the result, a part a rank.
Ending all_gather(Transfers& transfers, int ranks, const std::vector<std::byte>& own,
                  std::vector<std::vector<std::byte>>& all, std::uint32_t stream = 0,
                  std::chrono::milliseconds timeout = kLong);

/// A sum of int32, begun, in place.
Ending all_reduce(Transfers& transfers, int ranks, std::vector<std::int32_t>& values,
                  std::chrono::milliseconds timeout = kLong);

Ending barrier(Transfers& transfers, std::chrono::milliseconds timeout = kLong);

Ending send(Transfers& transfers, int to, const std::vector<std::byte>& bytes,
            std::uint32_t tag = 0, std::chrono::milliseconds timeout = kLong);
Ending want(Transfers& transfers, std::optional<int> from, std::vector<std::byte>& into,
            std::uint32_t tag = 0, std::chrono::milliseconds timeout = kLong);

}  // namespace distro::exchange::testing
