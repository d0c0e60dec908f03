#include "backend/exchange/rendezvous.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "tests/backend/exchange/ranks.h"

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
  const auto published = nlohmann::json::parse(store.get("distro/0/address/0"));
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

TEST(Rendezvous, GroupAfterGroupMeetsOnTheSameStore) {
  MemoryStore store(std::chrono::milliseconds(2000));
  for (int round = 0; round < 3; ++round) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < 2; ++rank) {
      threads.emplace_back([&, rank] {
        const auto group = Group::join({rank, 2, std::chrono::milliseconds(5000), ""},
                                       resolve_options({}, {}), store);
        EXPECT_EQ(group->round(), static_cast<std::uint64_t>(round));
        group->close();
      });
    }
    for (auto& thread : threads) {
      thread.join();
    }
  }
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
