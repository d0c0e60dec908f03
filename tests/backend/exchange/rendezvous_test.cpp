#include "backend/exchange/rendezvous.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>

#include "tests/backend/exchange/ranks.h"
#include "tests/seed.h"

namespace distro::exchange::testing {
namespace {

// What each of three ranks throws when it joins with these options.
std::vector<std::string> join(const std::vector<StringMap>& options,
                              const std::string& route = "") {
  MemoryStore store(std::chrono::milliseconds(2000));
  std::vector<std::string> errors(options.size());
  std::vector<std::thread> threads;
  for (std::size_t r = 0; r < options.size(); ++r) {
    threads.emplace_back([&, r] {
      try {
        const auto group = Group::join({static_cast<int>(r), static_cast<int>(options.size()),
                                        std::chrono::milliseconds(5000), route},
                                       resolve_options({}, options[r]), store);
        group->close();
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

TEST(Rendezvous, RanksOfOneHostMeetOnLoopbackWhateverTheRoute) {
  EXPECT_EQ(join({{}, {}, {}}, "192.0.2.7"), std::vector<std::string>(3));
}

// The endpoint that rank 0 of two publishes when both listen on `bind`; empty if it cannot start.
std::string endpoint_told(const std::string& bind, const std::string& route) {
  MemoryStore store(std::chrono::milliseconds(2000));
  const StringMap options = {{"bind", bind}, {"insecure", "1"}};
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        const auto group = Group::join({rank, 2, std::chrono::milliseconds(5000), route},
                                       resolve_options({}, options), store);
        group->close();
      } catch (const transport::ConfigError&) {
      } catch (const ExchangeError&) {
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  const auto published =
      nlohmann::json::parse(store.get("distro/" + store.get("distro/round") + "/address/0"));
  return published.value("endpoint", "");
}

TEST(Rendezvous, ARankThatListensOnEveryAddressTellsTheOneOnItsWayToTheStore) {
  EXPECT_TRUE(endpoint_told("0.0.0.0", "127.0.0.7").starts_with("tcp://127.0.0.7:"));
  EXPECT_TRUE(endpoint_told("0.0.0.0", "").starts_with("tcp://127.0.0.1:"));
  EXPECT_TRUE(endpoint_told("127.0.0.3", "127.0.0.7").starts_with("tcp://127.0.0.3:"));
  EXPECT_EQ(endpoint_told("0.0.0.0", "::1"), "");  // nobody listens there
}

TEST(Rendezvous, DifferentOptionsAreAnErrorOnEveryRankThatNamesRanksAndValues) {
  for (const auto& error : join({{{"k", "6"}}, {{"k", "6"}}, {{"k", "8"}, {"delay", "0"}}})) {
    EXPECT_NE(error.find("k: ranks 0, 1 have 6; rank 2 has 8"), std::string::npos) << error;
    EXPECT_NE(error.find("delay: rank 2 has 0; ranks 0, 1 have 1"), std::string::npos) << error;
  }
}

TEST(Rendezvous, OptionsOfOneRankAloneMayDiffer) {
  EXPECT_EQ(join({{{"threads", "1"}}, {{"threads", "2"}, {"log", "error"}}}),
            std::vector<std::string>(2));
}

TEST(Rendezvous, ARankThatCannotBindIsNamedToTheOthersAtOnce) {
  const auto errors = join({{}, {{"bind", "192.0.2.7"}, {"insecure", "1"}}, {}});
  EXPECT_NE(errors[0].find("rank 1 cannot start"), std::string::npos) << errors[0];
  EXPECT_NE(errors[1], "");
  EXPECT_NE(errors[2].find("rank 1 cannot start"), std::string::npos) << errors[2];
}

// Have ranks come to a store, each after its pause; what each throws.
std::vector<std::string> come(MemoryStore& store, int world_size, const std::vector<int>& ranks,
                              std::mt19937_64& random, std::chrono::milliseconds timeout) {
  store.set_timeout(timeout);
  std::vector<std::string> errors(ranks.size());
  std::vector<std::uint64_t> rounds(ranks.size());
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    const std::chrono::milliseconds pause(random() % 20);
    threads.emplace_back([&, i, pause] {
      std::this_thread::sleep_for(pause);
      try {
        const auto group =
            Group::join({ranks[i], world_size, timeout, ""}, resolve_options({}, {}), store);
        rounds[i] = group->round();
        group->close();
      } catch (const std::exception& error) {
        errors[i] = error.what();
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  if (!ranks.empty() && errors == std::vector<std::string>(ranks.size())) {
    EXPECT_EQ(rounds, std::vector<std::uint64_t>(ranks.size(), rounds.front()));
  }
  return errors;
}

TEST(Rendezvous, WhatEarlierMeetingsLeftInTheStoreDoesNoHarm) {
  const std::uint64_t seed = test::seed();
  std::mt19937_64 random(seed);
  MemoryStore store(std::chrono::milliseconds(5000));
  for (int meeting = 0; meeting < 12; ++meeting) {
    const int world_size = 2 + static_cast<int>(random() % 3);
    std::vector<int> all;
    std::vector<int> some;
    for (int rank = 0; rank < world_size; ++rank) {
      all.push_back(rank);
      if (random() % 2 == 0) {
        some.push_back(rank);
      }
    }
    if (some.size() == all.size()) {
      some.pop_back();
    }
    SCOPED_TRACE("meeting " + std::to_string(meeting) + ", seed " + std::to_string(seed));
    for (const auto& error : come(store, world_size, some, random, std::chrono::milliseconds(50))) {
      EXPECT_NE(error.find("did not come"), std::string::npos) << error;
    }
    EXPECT_EQ(come(store, world_size, all, random, std::chrono::milliseconds(5000)),
              std::vector<std::string>(all.size()));
  }
}

TEST(Rendezvous, RanksThatComeAgainAtOnceMeetAgain) {
  MemoryStore store(std::chrono::milliseconds(5000));
  std::vector<std::vector<std::uint64_t>> rounds(3);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 3; ++rank) {
    threads.emplace_back([&, rank] {
      for (int again = 0; again < 5; ++again) {
        const auto group = Group::join({rank, 3, std::chrono::milliseconds(5000), ""},
                                       resolve_options({}, {}), store);
        rounds[static_cast<std::size_t>(rank)].push_back(group->round());
        group->close();
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(rounds[0], rounds[1]);
  EXPECT_EQ(rounds[0], rounds[2]);
  EXPECT_EQ(std::set(rounds[0].begin(), rounds[0].end()).size(), 5);
}

TEST(Rendezvous, AMeetingsNumberThatIsNoneIsRefused) {
  MemoryStore store(std::chrono::milliseconds(1000));
  store.set("distro/round", "12/../x");
  EXPECT_THROW(
      Group::join({1, 2, std::chrono::milliseconds(1000), ""}, resolve_options({}, {}), store),
      ExchangeError);
}

TEST(Rendezvous, RanksMeetOverATransportByPathAndItsNameIsCompared) {
  const StringMap example{{"transport", DISTRO_EXAMPLE_TRANSPORT}};
  EXPECT_EQ(join({example, example, example}), std::vector<std::string>(3));
  for (const auto& error : join({example, {}})) {
    EXPECT_NE(error.find("transport: rank 0 has example 1.0; rank 1 has tcp"), std::string::npos)
        << error;
  }
}

TEST(Rendezvous, ARankThatDeclinesIsNamedToTheOthersAtOnce) {
  MemoryStore store(std::chrono::milliseconds(2000));
  std::thread other([&] {
    decline(store, {1, 2, std::chrono::milliseconds(2000), ""}, "DISTRO_K=0 is not allowed");
  });
  try {
    Group::join({0, 2, std::chrono::milliseconds(2000), ""}, resolve_options({}, {}), store);
    ADD_FAILURE() << "joined alone";
  } catch (const ExchangeError& error) {
    EXPECT_NE(std::string(error.what()).find("rank 1 cannot start: DISTRO_K=0"), std::string::npos)
        << error.what();
  }
  other.join();
}

TEST(Rendezvous, ARankThatDoesNotComeIsNamed) {
  MemoryStore store(std::chrono::milliseconds(200));
  try {
    Group::join({0, 2, std::chrono::milliseconds(200), ""}, resolve_options({}, {}), store);
    FAIL() << "joined alone";
  } catch (const transport::PeerTimeout& error) {
    EXPECT_EQ(error.rank(), 1);
    EXPECT_NE(std::string(error.what()).find("rank 1 did not come"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace distro::exchange::testing
