// Ranks with keys meet, or learn at once why not.

#include "transport/keys.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/backend/exchange/ranks.h"

namespace distro::exchange::testing {
namespace {

using transport::KeyPair;

// A directory with the key files of four ranks of a world and a peers file of all.
class Keys : public ::testing::Test {
 protected:
  Keys() {
    std::string name = "/tmp/distro-keys-XXXXXX";
    folder = ::mkdtemp(name.data());
    for (int rank = 0; rank < 4; ++rank) {
      pairs.push_back(transport::make_key_pair());
      transport::write_secret_file(secret(rank), pairs.back(), "a rank", false);
    }
    write("peers.txt", pairs);
  }
  ~Keys() override { std::filesystem::remove_all(folder); }

  [[nodiscard]] std::string path(const std::string& name) const { return folder + "/" + name; }
  [[nodiscard]] std::string secret(int rank) const {
    return path("rank" + std::to_string(rank) + ".key");
  }
  void write(const std::string& name, const std::vector<KeyPair>& of) const {
    std::ofstream file(path(name));
    for (std::size_t rank = 0; rank < of.size(); ++rank) {
      file << transport::peers_line(std::to_string(rank), of[rank].public_key, "") << "\n";
    }
  }
  [[nodiscard]] StringMap options(int rank, const std::string& peers = "peers.txt") const {
    return {{"curve_secret_file", secret(rank)}, {"curve_peers_file", path(peers)}};
  }

  // What each rank throws; those that meet send each other a message.
  std::vector<std::string> join(const std::vector<StringMap>& given,
                                const std::vector<int>& world_ranks = {}) {
    MemoryStore store(std::chrono::milliseconds(2000));
    std::vector<std::string> errors(given.size());
    std::vector<std::thread> threads;
    for (std::size_t r = 0; r < given.size(); ++r) {
      threads.emplace_back([&, r] {
        try {
          const auto group = Group::join({static_cast<int>(r),
                                          static_cast<int>(given.size()),
                                          std::chrono::milliseconds(5000),
                                          "",
                                          {},
                                          world_ranks},
                                         resolve_options({}, given[r]), store);
          group->close();  // waits until the others have taken the goodbye: they are connected
          EXPECT_EQ(group->channel_counters().rejected_connections, 0U);
          EXPECT_FALSE(group->lost());
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

  std::string folder;
  std::vector<KeyPair> pairs;
};

void expect_all(const std::vector<std::string>& errors, const std::string& part) {
  for (std::size_t rank = 0; rank < errors.size(); ++rank) {
    EXPECT_NE(errors[rank].find(part), std::string::npos)
        << "rank " << rank << ": " << errors[rank];
  }
}

TEST_F(Keys, RanksWithKeysMeet) {
  EXPECT_EQ(join({options(0), options(1), options(2)}), std::vector<std::string>(3));
}

// An open connection to a port of this host, or -1.
int connection_to(std::uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) {
    return fd;
  }
  ::close(fd);
  return -1;
}

TEST_F(Keys, StrangersAreCountedAtBothPortsOfARank) {
  constexpr std::uint16_t kFirstPort = 41'800;
  constexpr std::uint16_t kLastPort = 41'839;
  MemoryStore store(std::chrono::milliseconds(5000));
  std::vector<std::shared_ptr<Group>> groups(2);
  const auto each = [&](const std::function<void(std::size_t rank)>& body) {
    std::thread other([&] { body(1); });
    body(0);
    other.join();
  };
  each([&](std::size_t rank) {
    auto chosen = options(static_cast<int>(rank));
    chosen["ports"] = std::to_string(kFirstPort) + "-" + std::to_string(kLastPort);
    groups[rank] =
        Group::join({static_cast<int>(rank), 2, std::chrono::milliseconds(5000), "", {}, {}},
                    resolve_options({}, chosen), store);
  });
  for (std::uint16_t port = kFirstPort; port <= kLastPort; ++port) {
    if (const int stranger = connection_to(port); stranger >= 0) {
      ::close(stranger);
    }
  }
  for (const auto& group : groups) {
    const auto rejected = [&] { return group->channel_counters().rejected_connections; };
    for (const auto end = transport::Clock::now() + std::chrono::seconds(5);
         rejected() < 2 && transport::Clock::now() < end;) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    EXPECT_EQ(rejected(), 2U);
  }
  each([&](std::size_t rank) { groups[rank]->close(); });
}

TEST_F(Keys, ASubgroupUsesTheKeysOfTheWorldsRanks) {
  EXPECT_EQ(join({options(3), options(1)}, {3, 1}), std::vector<std::string>(2));
  expect_all(join({options(3), options(1)}), "another than that of rank");
}

TEST_F(Keys, SomeRanksWithKeysAndSomeWithoutAreNamedOnAll) {
  expect_all(join({options(0), {}, options(2)}), "keys: rank 1 has 0; ranks 0, 2 have 1");
}

TEST_F(Keys, ARankThatCannotReadItsKeyIsNamedToTheOthers) {
  std::filesystem::permissions(secret(1), std::filesystem::perms(0644));
  const auto errors = join({options(0), options(1), options(2)});
  expect_all(errors, "chmod 600 " + secret(1));
  EXPECT_NE(errors[0].find("rank 1 cannot start"), std::string::npos) << errors[0];
}

TEST_F(Keys, ARankWithAnothersKeyIsNamedToTheOthers) {
  expect_all(join({options(0), options(2)}), "rank 1: the key in " + secret(2));
}

TEST_F(Keys, PeersFilesThatDifferAreNoticedBeforeAnythingIsDialled) {
  std::vector<KeyPair> others = pairs;
  others[2] = transport::make_key_pair();
  write("other.txt", others);
  const auto errors = join({options(0, "other.txt"), options(1), options(2)});
  expect_all(errors, "rank 2 has the public key " + pairs[2].public_key + ", and rank 0 has " +
                         others[2].public_key + " for it in its peers file " + path("other.txt"));
}

TEST_F(Keys, AGroupOfMoreRanksThanTheFileNamesThem) {
  auto few = pairs;
  few.pop_back();
  few.pop_back();
  write("few.txt", few);
  expect_all(join({options(0, "few.txt"), options(1, "few.txt"), options(2, "few.txt")}),
             "has no line for rank 2");
}

TEST_F(Keys, BeyondLoopbackNoOtherConsentIsNeeded) {
  StringMap given = options(0);
  given["bind"] = "0.0.0.0";
  StringMap other = options(1);
  other["bind"] = "0.0.0.0";
  EXPECT_EQ(join({given, other}), std::vector<std::string>(2));
  expect_all(join({{{"bind", "0.0.0.0"}}, {{"bind", "0.0.0.0"}}}), "torch-distro keygen");
}

TEST_F(Keys, TwoGroupsOfTheSameRanksWorkAtTheSameTime) {
  std::thread other([&] {
    EXPECT_EQ(join({options(1), options(0)}, {1, 0}), std::vector<std::string>(2));
  });
  EXPECT_EQ(join({options(0), options(1)}), std::vector<std::string>(2));
  other.join();
}

}  // namespace
}  // namespace distro::exchange::testing
