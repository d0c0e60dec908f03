#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "backend/exchange/exact.h"
#include "backend/exchange/group.h"
#include "backend/exchange/weights_exchange.h"

namespace distro::exchange::testing {

/// A store in memory for ranks that are threads.
class MemoryStore : public BlobStore {
 public:
  explicit MemoryStore(std::chrono::milliseconds timeout) : timeout_(timeout) {}
  void set(const std::string& key, const std::string& value) override;
  std::string get(const std::string& key) override;
  bool has(const std::string& key) override;
  void set_timeout(std::chrono::milliseconds timeout);

 private:
  std::mutex mutex_;
  std::chrono::milliseconds timeout_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
};

/// A meeting place of `size` threads that hand each other a pointer.
class Rendezvous {
 public:
  explicit Rendezvous(std::size_t size) : pointers_(size) {}
  /// Everybody's pointer, by rank, once all have come. Call leave() before the pointers go.
  std::vector<const void*> arrive(std::size_t rank, const void* pointer);
  void leave();

 private:
  void wait_for_all(std::unique_lock<std::mutex>& lock);

  std::vector<const void*> pointers_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t arrived_ = 0;
  std::uint64_t round_ = 0;
};

/// Exact collectives between threads.
class ThreadCollectives : public ExactCollectives {
 public:
  ThreadCollectives(Rendezvous& place, std::size_t rank, std::size_t size)
      : place_(place), rank_(rank), size_(size) {}
  void mean(std::span<const plugins::TensorView> tensors) override;
  void broadcast(std::span<const plugins::TensorView> tensors) override;

 private:
  Rendezvous& place_;
  const std::size_t rank_;
  const std::size_t size_;
};

/// One rank of a test: a module of fp32 tensors whose optimizer is a random walk with a common
/// drift.
struct Rank {
  int rank = 0;
  std::shared_ptr<Group> group;
  std::unique_ptr<ThreadCollectives> exact;
  std::unique_ptr<WeightsExchange> exchange;
  std::vector<std::vector<float>> weights;
  std::mt19937_64 random;

  [[nodiscard]] std::vector<plugins::TensorView> views();
  /// Move every weight as an optimizer would.
  void move();
  /// A sync point at the gain of an optimizer that normalises.
  void sync();
};

struct Setting {
  int ranks = 2;
  StringMap options = {};
  std::chrono::milliseconds timeout{20'000};
  std::vector<std::vector<std::int64_t>> shapes = {{70, 130}, {130}, {}, {4096}, {5000}, {3}};
  std::uint64_t seed = 1;
  bool same_start = true;
  /// Labels by rank (DISTRO_SITE). The ranks of a site move alike.
  std::vector<std::string> sites = {};
};

/// Run `body` as every rank, each in its thread, and return what each threw (empty: nothing).
std::vector<std::string> run_ranks(const Setting& setting, const std::function<void(Rank&)>& body);

/// The same, and fail the test if any rank threw.
void expect_ranks(const Setting& setting, const std::function<void(Rank&)>& body);

}  // namespace distro::exchange::testing
