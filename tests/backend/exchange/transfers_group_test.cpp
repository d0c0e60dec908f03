#include <gtest/gtest.h>

#include <thread>

#include "backend/exchange/error.h"
#include "tests/backend/exchange/ranks.h"
#include "tests/backend/exchange/transfers.h"

namespace distro::exchange::testing {
namespace {

// Run `body` as each rank of a group whose exact collectives run over its own transport; what each
// threw.
std::vector<std::string> groups(int ranks, StringMap options,
                                const std::function<void(Group& group)>& body,
                                const std::vector<std::string>& sites = {}) {
  options.emplace("exact", "transport");
  MemoryStore store(std::chrono::milliseconds(5000));
  std::vector<std::string> errors(static_cast<std::size_t>(ranks));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      const auto index = static_cast<std::size_t>(rank);
      try {
        StringMap own = options;
        if (!sites.empty()) {
          own["site"] = sites[index];
        }
        const auto group = Group::join({rank, ranks, std::chrono::milliseconds(20'000), ""},
                                       resolve_options({}, own), store);
        std::vector<int> members;
        for (int member = 0; member < ranks; ++member) {
          members.push_back(member);
        }
        group->transfers()->open(0, members);
        try {
          body(*group);
        } catch (const std::exception& error) {
          errors[index] = error.what();
        }
        group->close();
      } catch (const std::exception& error) {
        errors[index] = std::string("join: ") + error.what();
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  return errors;
}

void sum(Group& group) {
  const int ranks = group.world_size();
  std::vector<std::int32_t> values(100'000, group.rank() + 1);
  all_reduce(*group.transfers(), ranks, values).wait();
  EXPECT_EQ(values.back(), ranks * (ranks + 1) / 2);
}

TEST(TransfersOfAGroup, EveryCarrier) {
  for (const std::string carrier : {"tcp", "ipc", "inproc", DISTRO_EXAMPLE_TRANSPORT}) {
    SCOPED_TRACE(carrier);
    EXPECT_EQ(groups(3, {{"transport", carrier}}, sum), std::vector<std::string>(3));
  }
}

TEST(TransfersOfAGroup, AllRanksAreConnectedWhateverTheirSites) {
  EXPECT_EQ(groups(4, {{"transport", "inproc"}}, sum, {"a", "a", "b", "b"}),
            std::vector<std::string>(4));
}

TEST(TransfersOfAGroup, OneRankHasNone) {
  MemoryStore store(std::chrono::milliseconds(1000));
  const auto group = Group::join({0, 1, std::chrono::milliseconds(1000), ""},
                                 resolve_options({}, {{"exact", "transport"}}), store);
  EXPECT_EQ(group->transfers(), nullptr);
  group->close();
}

TEST(TransfersOfAGroup, ALossInOneChannelIsALossInBoth) {
  // Rank 1 fails in an exchange while the others are in a barrier, and the other way round.
  const auto in_barrier = groups(3, {{"transport", "inproc"}}, [](Group& group) {
    sum(group);
    if (group.rank() == 1) {
      group.abort(1, "rank 1 has burnt its weights");
    }
    barrier(*group.transfers()).wait();
  });
  const auto in_exchange = groups(3, {{"transport", "inproc"}}, [](Group& group) {
    sum(group);
    if (group.rank() == 1) {
      std::vector<std::int32_t> values(3);
      barrier(*group.transfers(), std::chrono::milliseconds(200)).wait();
    }
    static_cast<void>(
        group.take(1, {.module = 0, .kind = MessageKind::begin, .exchange = 0}, group.deadline()));
  });
  for (std::size_t rank = 0; rank < 3; ++rank) {
    EXPECT_NE(in_barrier[rank].find("rank 1 has burnt"), std::string::npos) << in_barrier[rank];
    EXPECT_NE(in_exchange[rank].find("late at barrier 2"), std::string::npos) << in_exchange[rank];
  }
}

TEST(TransfersOfAGroup, ASecondPortIsNeededAndAskedFor) {
  const auto errors = groups(2, {{"ports", "41999"}}, sum);
  for (const auto& error : errors) {
    EXPECT_NE(error.find("DISTRO_PORTS"), std::string::npos) << error;
  }
}

TEST(TransfersOfAGroup, AllRanksNeedTheSame) {
  MemoryStore store(std::chrono::milliseconds(2000));
  std::vector<std::string> errors(2);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        const StringMap options = {{"exact", rank == 0 ? "transport" : "auto"}};
        Group::join({rank, 2, std::chrono::milliseconds(2000), ""}, resolve_options({}, options),
                    store)
            ->close();
      } catch (const ExchangeError& error) {
        errors[static_cast<std::size_t>(rank)] = error.what();
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  for (const auto& error : errors) {
    EXPECT_NE(error.find("exact: rank 1 has gloo; rank 0 has transport"), std::string::npos)
        << error;
  }
}

}  // namespace
}  // namespace distro::exchange::testing
