#include "backend/exchange/transfers.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "tests/backend/exchange/transfers.h"
#include "tests/seed.h"

namespace distro::exchange::testing {
namespace {

using Bytes = std::vector<std::byte>;

TEST(Transfers, AllGatherOfAnySize) {
  constexpr int kRanks = 3;
  TransferRanks ranks(kRanks);
  ranks.expect_each([](int rank, Transfers& transfers) {
    // Nothing, part of a chunk, chunks, and more than a window.
    for (const std::size_t size : {std::size_t{0}, std::size_t{1}, kTransferChunk - 1,
                                   kTransferChunk, 3 * kTransferChunk + 5, std::size_t{5} << 20}) {
      std::vector<Bytes> all;
      const Bytes own = pattern(size, static_cast<std::uint64_t>(rank));
      all_gather(transfers, kRanks, own, all).wait();
      for (int peer = 0; peer < kRanks; ++peer) {
        ASSERT_TRUE(all[static_cast<std::size_t>(peer)] ==
                    pattern(size, static_cast<std::uint64_t>(peer)))
            << size << " bytes of rank " << peer;
      }
    }
  });
}

TEST(Transfers, ReductionsInPlaceAreExact) {
  constexpr int kRanks = 4;
  TransferRanks ranks(kRanks);
  ranks.expect_each([](int rank, Transfers& transfers) {
    for (const std::size_t size : {std::size_t{0}, std::size_t{1}, kTransferChunk / 4,
                                   kTransferChunk, std::size_t{5} << 18}) {
      std::vector<std::int32_t> values(size);
      std::iota(values.begin(), values.end(), 1000 * rank);
      all_reduce(transfers, kRanks, values).wait();
      for (std::size_t i = 0; i < size; ++i) {
        ASSERT_EQ(values[i], 4 * static_cast<std::int32_t>(i) + 6000);
      }
    }
  });
}

TEST(Transfers, ABarrierEndsWhenAllHaveCome) {
  TransferRanks ranks(2);
  Ending first = barrier(ranks[0]);
  std::vector<std::byte> message(1);
  // Rank 1 is alive and answers, but has not come.
  Ending wanted = want(ranks[1], 0, message);
  send(ranks[0], 1, Bytes(1)).wait();
  wanted.wait();
  EXPECT_FALSE(first.is_over());
  barrier(ranks[1]).wait();
  first.wait();
}

// The root of one operation after the other, while the others are anywhere.
TEST(Transfers, RootedOperationsDoNotWaitForRanksThatDoNotMatter) {
  TransferRanks ranks(3);
  const auto issue = [](Transfers& transfers, Collective collective) {
    Ending ending;
    collective.timeout = kLong;
    collective.done = ending.done();
    transfers.issue(std::move(collective));
    return ending;
  };
  const Bytes data = pattern(1000, 5);
  const TransferDescription what{
      .operation = TransferOperation::broadcast, .root = 0, .elements = 1000};
  // Rank 2 has not come to it, nor does the root wait for anybody.
  issue(ranks[0], {.what = what, .outgoing = {{data, {1, 2}}}}).wait();
  Bytes got(1000);
  issue(ranks[1], {.what = what, .incoming = {{.from = 0, .bytes = 1000, .into = got.data()}}})
      .wait();
  EXPECT_EQ(got, data);
  std::fill(got.begin(), got.end(), std::byte{0});
  issue(ranks[2], {.what = what, .incoming = {{.from = 0, .bytes = 1000, .into = got.data()}}})
      .wait();
  EXPECT_EQ(got, data);
}

TEST(Transfers, WhatGrowsTakesWhatComes) {
  TransferRanks ranks(2);
  ranks.expect_each([](int rank, Transfers& transfers) {
    const Bytes own = pattern(rank == 0 ? 3 : 700'000, static_cast<std::uint64_t>(rank));
    transport::Bytes got;
    Ending ending;
    Collective collective{.what = {.operation = TransferOperation::sparse_all_reduce},
                          .outgoing = {{own, {1 - rank}}},
                          .incoming = {{.from = 1 - rank, .bytes = 700'000, .growing = &got}},
                          .timeout = kLong,
                          .done = ending.done()};
    transfers.issue(std::move(collective));
    ending.wait();
    EXPECT_TRUE(got == pattern(rank == 0 ? 700'000 : 3, static_cast<std::uint64_t>(1 - rank)));
  });
}

TEST(Transfers, MessagesOfATagComeInOrderAndTagsDoNotWaitForEachOther) {
  TransferRanks ranks(2);
  // More than any window, and nobody wants the first tag yet.
  const Bytes large = pattern(std::size_t{9} << 20, 1);
  const Bytes small = pattern(10, 2);
  Ending blocked = send(ranks[0], 1, large, 7);
  Ending after = send(ranks[0], 1, small, 7);
  const std::uint32_t negative = static_cast<std::uint32_t>(-1);
  Bytes got_small(10);
  Ending other = want(ranks[1], 0, got_small, negative);
  send(ranks[0], 1, small, negative).wait();
  EXPECT_EQ(other.wait(), 0);
  EXPECT_EQ(got_small, small);
  EXPECT_FALSE(blocked.is_over());

  Bytes got_large(large.size());
  Ending first = want(ranks[1], 0, got_large, 7);
  std::fill(got_small.begin(), got_small.end(), std::byte{0});
  Ending second = want(ranks[1], 0, got_small, 7);
  EXPECT_EQ(first.wait(), 0);
  EXPECT_EQ(second.wait(), 0);
  blocked.wait();
  after.wait();
  EXPECT_TRUE(got_large == large);
  EXPECT_EQ(got_small, small);
}

TEST(Transfers, OfAnyRankComesWhatWasSentWhateverIsFirst) {
  TransferRanks ranks(3);
  Bytes before(4);
  Bytes after(4);
  Ending early = want(ranks[0], std::nullopt, before, 3);
  send(ranks[2], 0, Bytes(4, std::byte{2}), 3).wait();
  EXPECT_EQ(early.wait(), 2);
  EXPECT_EQ(before, Bytes(4, std::byte{2}));
  send(ranks[1], 0, Bytes(4, std::byte{1}), 3).wait();
  EXPECT_EQ(want(ranks[0], std::nullopt, after, 3).wait(), 1);
  EXPECT_EQ(after, Bytes(4, std::byte{1}));
}

// A ring of large messages which all send before they receive, across collectives in between.
TEST(Transfers, MessagesAndCollectivesDoNotWaitForEachOther) {
  constexpr int kRanks = 3;
  TransferRanks ranks(kRanks, [](auto& config) { config.window_bytes = 4 * kTransferChunk; });
  ranks.expect_each([](int rank, Transfers& transfers) {
    const int next = (rank + 1) % kRanks;
    const int before = (rank + kRanks - 1) % kRanks;
    const Bytes own = pattern(std::size_t{3} << 20, static_cast<std::uint64_t>(rank));
    Ending sent = send(transfers, next, own);
    std::vector<Bytes> all;
    Ending gathered = all_gather(transfers, kRanks, own, all);
    std::vector<Bytes> others;
    Ending of_stream = all_gather(transfers, kRanks, own, others, 1);
    Bytes got(own.size());
    want(transfers, before, got).wait();
    EXPECT_TRUE(got == pattern(own.size(), static_cast<std::uint64_t>(before)));
    sent.wait();
    of_stream.wait();
    gathered.wait();
    EXPECT_TRUE(all == others);
  });
}

TEST(Transfers, AThousandMessagesThatNobodyWantsYet) {
  TransferRanks ranks(2);
  constexpr std::size_t kSize = 40'000;  // all of them are more than the pool
  const Bytes data = pattern(kSize, 1);
  std::vector<Ending> sent;
  for (std::uint32_t i = 0; i < 1000; ++i) {
    sent.push_back(send(ranks[0], 1, data, i));
  }
  EXPECT_FALSE(sent.back().is_over());
  Bytes got(kSize);
  for (std::uint32_t i = 1000; i-- > 0;) {
    std::fill(got.begin(), got.end(), std::byte{0});
    want(ranks[1], 0, got, i).wait();
    ASSERT_TRUE(got == data) << i;
  }
  for (auto& ending : sent) {
    ending.wait();
  }
}

// What is under way and not used stays below the window however large the operation is.
TEST(Transfers, ARankThatIsAheadDoesNotFillTheOthersMemory) {
  constexpr std::size_t kWindow = 8 * kTransferChunk;
  TransferRanks ranks(2, [](auto& config) { config.window_bytes = kWindow; });
  const Bytes own = pattern(std::size_t{16} << 20, 3);
  std::vector<Bytes> all;
  Ending ahead = all_gather(ranks[0], 2, own, all);
  // Rank 1 has taken all that came before this message.
  Bytes message(1);
  Ending wanted = want(ranks[1], 0, message);
  while (ranks.channels[0]->counters().socket_bytes_sent < kWindow - kTransferChunk) {
    std::this_thread::yield();
  }
  send(ranks[0], 1, Bytes(1)).wait();
  wanted.wait();
  EXPECT_LT(ranks.channels[0]->counters().socket_bytes_sent, kWindow + (kWindow / 4));
  EXPECT_FALSE(ahead.is_over());
  std::vector<Bytes> theirs;
  all_gather(ranks[1], 2, own, theirs).wait();
  ahead.wait();
  EXPECT_TRUE(all[1] == own && theirs[0] == own);
}

// A callback that waits for an operation that is issued in it, as communication hooks do.
TEST(Transfers, CallbacksMayWaitForOtherOperations) {
  constexpr int kRanks = 2;
  TransferRanks ranks(kRanks);
  ranks.expect_each([](int, Transfers& transfers) {
    std::vector<std::int32_t> second(2, 1);
    Ending all;
    Collective first{.timeout = kLong, .done = [&](const std::exception_ptr& error) {
                       all_reduce(transfers, kRanks, second).wait();
                       all.done()(error);
                     }};
    transfers.issue(std::move(first));
    all.wait();
    EXPECT_EQ(second, (std::vector<std::int32_t>{2, 2}));
  });
}

TEST(Transfers, AStreamOfSomeOfTheRanks) {
  TransferRanks ranks(4);
  ranks.expect_each([](int rank, Transfers& transfers) {
    const bool low = rank < 2;
    const int other = low ? 1 - rank : 5 - rank;
    transfers.open(2, low ? std::vector<int>{0, 1} : std::vector<int>{2, 3});
    const Bytes own = pattern(100, static_cast<std::uint64_t>(rank));
    Bytes got(100);
    Ending ending;
    transfers.issue({.stream = 2,
                     .what = {.operation = TransferOperation::all_gather, .elements = 100},
                     .outgoing = {{own, {other}}},
                     .incoming = {{.from = other, .bytes = 100, .into = got.data()}},
                     .timeout = kLong,
                     .done = ending.done()});
    ending.wait();
    EXPECT_EQ(got, pattern(100, static_cast<std::uint64_t>(other)));
  });
}

// Random programs: the same collectives on all ranks, of random kinds and sizes, several under way
// at once, beside messages.
TEST(Transfers, RandomPrograms) {
  const auto seed = test::seed();
  SCOPED_TRACE(::testing::Message() << "TEST_SEED=" << seed);
  constexpr int kRanks = 3;
  TransferRanks ranks(kRanks, [](auto& config) { config.window_bytes = 4 * kTransferChunk; });
  ranks.expect_each([&](int rank, Transfers& transfers) {
    std::mt19937 common(seed);  // draws the same on all ranks
    struct Gathered {
      Bytes own;
      std::vector<Bytes> all;
    };
    for (int round = 0; round < 20; ++round) {
      std::vector<Ending> endings;
      std::vector<std::unique_ptr<Gathered>> gathered;
      std::vector<std::unique_ptr<std::vector<std::int32_t>>> reduced;
      std::vector<std::unique_ptr<Bytes>> messages;
      for (auto i = 1 + common() % 5; i > 0; --i) {
        const std::size_t size =
            common() % 3 == 0 ? common() % 64 : common() % (6 * kTransferChunk);
        switch (common() % 3) {
          case 0:
            gathered.push_back(std::make_unique<Gathered>());
            gathered.back()->own = pattern(size, static_cast<std::uint64_t>(rank));
            endings.push_back(all_gather(transfers, kRanks, gathered.back()->own,
                                         gathered.back()->all,
                                         static_cast<std::uint32_t>(common() % 2)));
            break;
          case 1:
            reduced.push_back(std::make_unique<std::vector<std::int32_t>>(size / 4, rank));
            endings.push_back(all_reduce(transfers, kRanks, *reduced.back()));
            break;
          default: {
            const auto tag = static_cast<std::uint32_t>(common() % 2);
            messages.push_back(std::make_unique<Bytes>(pattern(size, 9)));
            endings.push_back(send(transfers, (rank + 1) % kRanks, *messages.back(), tag));
            messages.push_back(std::make_unique<Bytes>(size));
            endings.push_back(want(transfers, (rank + 2) % kRanks, *messages.back(), tag));
            break;
          }
        }
      }
      for (auto& ending : endings) {
        ending.wait();
      }
      for (const auto& one : gathered) {
        for (int peer = 0; peer < kRanks; ++peer) {
          EXPECT_TRUE(one->all[static_cast<std::size_t>(peer)] ==
                      pattern(one->own.size(), static_cast<std::uint64_t>(peer)));
        }
      }
      for (const auto& one : reduced) {
        EXPECT_TRUE(std::ranges::all_of(*one, [](auto value) { return value == 3; }));
      }
      for (std::size_t i = 0; i + 1 < messages.size(); i += 2) {
        EXPECT_TRUE(*messages[i] == *messages[i + 1]);
      }
    }
  });
}

}  // namespace
}  // namespace distro::exchange::testing
