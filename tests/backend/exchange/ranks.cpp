#include "tests/backend/exchange/ranks.h"

#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>
#include <thread>

namespace distro::exchange::testing {

void MemoryStore::set(const std::string& key, const std::string& value) {
  const std::lock_guard lock(mutex_);
  values_[key] = value;
  changed_.notify_all();
}

std::string MemoryStore::get(const std::string& key) {
  std::unique_lock lock(mutex_);
  if (!changed_.wait_for(lock, timeout_, [&] { return values_.contains(key); })) {
    throw std::runtime_error("time-out in the store");
  }
  return values_[key];
}

void MemoryStore::set_timeout(std::chrono::milliseconds timeout) {
  const std::lock_guard lock(mutex_);
  timeout_ = timeout;
}

bool MemoryStore::has(const std::string& key) {
  const std::lock_guard lock(mutex_);
  return values_.contains(key);
}

void Rendezvous::wait_for_all(std::unique_lock<std::mutex>& lock) {
  const auto round = round_;
  if (++arrived_ == pointers_.size()) {
    arrived_ = 0;
    ++round_;
    changed_.notify_all();
    return;
  }
  // A rank that failed never comes; the test must fail instead of hanging.
  if (!changed_.wait_for(lock, std::chrono::seconds(30), [&] { return round_ != round; })) {
    throw std::runtime_error("a rank did not come to an exact collective");
  }
}

std::vector<const void*> Rendezvous::arrive(std::size_t rank, const void* pointer) {
  std::unique_lock lock(mutex_);
  pointers_[rank] = pointer;
  wait_for_all(lock);
  return pointers_;
}

void Rendezvous::leave() {
  std::unique_lock lock(mutex_);
  wait_for_all(lock);
}

void ThreadCollectives::mean(std::span<const plugins::TensorView> tensors) {
  const auto everybody = place_.arrive(rank_, &tensors);
  std::vector<std::vector<float>> means;
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    std::vector<float> sum(tensors[t].elements, 0.0F);
    for (const void* other : everybody) {
      const auto& views = *static_cast<const std::span<const plugins::TensorView>*>(other);
      const auto* values = static_cast<const float*>(views[t].data);
      for (std::size_t i = 0; i < sum.size(); ++i) {
        sum[i] += values[i] / static_cast<float>(size_);
      }
    }
    means.push_back(std::move(sum));
  }
  place_.leave();
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    std::memcpy(tensors[t].data, means[t].data(), means[t].size() * sizeof(float));
  }
}

void ThreadCollectives::broadcast(std::span<const plugins::TensorView> tensors) {
  const auto everybody = place_.arrive(rank_, &tensors);
  const auto& first = *static_cast<const std::span<const plugins::TensorView>*>(everybody[0]);
  for (std::size_t t = 0; t < tensors.size() && rank_ != 0; ++t) {
    std::memcpy(tensors[t].data, first[t].data, tensors[t].elements * sizeof(float));
  }
  place_.leave();
}

std::vector<plugins::TensorView> Rank::views() {
  std::vector<plugins::TensorView> result;
  for (auto& tensor : weights) {
    result.push_back({tensor.data(), kernels::DType::f32, tensor.size()});
  }
  return result;
}

void Rank::move() {
  std::normal_distribution<float> step(1e-4F, 1e-3F);
  for (auto& tensor : weights) {
    for (auto& weight : tensor) {
      weight += step(random);
    }
  }
}

void Rank::sync() { exchange->sync(views(), *exact, group->sites().gain()); }

std::vector<std::string> run_ranks(const Setting& setting, const std::function<void(Rank&)>& body) {
  MemoryStore store(setting.timeout);
  const auto size = static_cast<std::size_t>(setting.ranks);
  Rendezvous place(size);
  std::vector<std::string> errors(size);
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < size; ++r) {
    threads.emplace_back([&, r] {
      try {
        Rank rank;
        rank.rank = static_cast<int>(r);
        StringMap options = setting.options;
        if (!setting.sites.empty()) {
          options["site"] = setting.sites[r];
        }
        rank.group = Group::join({rank.rank, setting.ranks, setting.timeout, ""},
                                 resolve_options({}, options), store);
        rank.random.seed(setting.seed * 1000 +
                         static_cast<std::uint64_t>(rank.group->sites().participant_of(rank.rank)));
        rank.exact = std::make_unique<ThreadCollectives>(place, r, size);
        std::vector<TensorSpec> specs;
        std::mt19937_64 start(setting.same_start ? setting.seed : setting.seed + r);
        std::normal_distribution<float> normal(0.0F, 0.1F);
        for (const auto& shape : setting.shapes) {
          specs.push_back({"tensor" + std::to_string(specs.size()), kernels::DType::f32, shape});
          auto& tensor = rank.weights.emplace_back(specs.back().elements());
          for (auto& weight : tensor) {
            weight = normal(start);
          }
        }
        rank.exchange = std::make_unique<WeightsExchange>(rank.group, specs);
        try {
          body(rank);
        } catch (...) {
          rank.group->close();
          throw;
        }
        rank.group->close();
      } catch (const std::exception& error) {
        errors[r] = error.what();
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  return errors;
}

void expect_ranks(const Setting& setting, const std::function<void(Rank&)>& body) {
  const auto errors = run_ranks(setting, body);
  for (std::size_t r = 0; r < errors.size(); ++r) {
    EXPECT_EQ(errors[r], "") << "rank " << r;
  }
}

}  // namespace distro::exchange::testing
