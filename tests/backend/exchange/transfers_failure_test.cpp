#include <gtest/gtest.h>

#include <cstring>

#include "backend/exchange/error.h"
#include "tests/backend/exchange/transfers.h"

namespace distro::exchange::testing {
namespace {

using Bytes = std::vector<std::byte>;
using std::chrono::milliseconds;

void expect_parts(const std::vector<std::string>& errors, const std::vector<std::string>& parts) {
  for (std::size_t rank = 0; rank < errors.size(); ++rank) {
    for (const auto& part : parts) {
      EXPECT_NE(errors[rank].find(part), std::string::npos)
          << "rank " << rank << " says: " << errors[rank];
    }
  }
}

Ending issue(Transfers& transfers, Collective collective) {
  Ending ending;
  collective.timeout = kLong;
  collective.done = ending.done();
  transfers.issue(std::move(collective));
  return ending;
}

TEST(TransfersFailure, ADifferenceIsAnErrorOnEveryRankThatNamesRanksAndWhatDiffers) {
  constexpr int kRanks = 3;
  TransferRanks ranks(kRanks);
  const auto errors = ranks.each([](int rank, Transfers& transfers) {
    barrier(transfers).wait();
    std::vector<std::int32_t> values(rank == 2 ? 11 : 10);
    all_reduce(transfers, kRanks, values).wait();
  });
  expect_parts(errors, {"collective 2", "ranks 0, 1 do all_reduce of 10 int32 (SUM)",
                        "rank 2 does all_reduce of 11 int32 (SUM)"});
}

TEST(TransfersFailure, AnotherOperationIsADifferenceAndWhatFollowsFailsWithTheSame) {
  TransferRanks ranks(2);
  const auto errors = ranks.each([](int rank, Transfers& transfers) {
    std::vector<std::int32_t> values(10);
    try {
      rank == 0 ? barrier(transfers).wait() : all_reduce(transfers, 2, values).wait();
    } catch (const ExchangeError&) {
      barrier(transfers).wait();  // throws from here on
    }
  });
  expect_parts(errors, {"rank 0 does barrier", "rank 1 does all_reduce of 10 int32 (SUM)"});
}

TEST(TransfersFailure, DifferentRootsDoNotHang) {
  TransferRanks ranks(2);
  const Bytes data(8);
  const auto errors = ranks.each([&](int rank, Transfers& transfers) {
    // Each takes the other for the root, and so waits for it.
    Bytes got(8);
    issue(transfers, {.what = {.operation = TransferOperation::broadcast,
                               .root = static_cast<std::uint32_t>(1 - rank),
                               .elements = 8},
                      .incoming = {{.from = 1 - rank, .bytes = 8, .into = got.data()}}})
        .wait();
  });
  expect_parts(errors, {"rank 0 does broadcast from rank 1", "rank 1 does broadcast from rank 0"});
}

TEST(TransfersFailure, SizesThatOnlyTheTwoOfThemKnowOfAreCompared) {
  TransferRanks ranks(2);
  const auto errors = ranks.each([&](int rank, Transfers& transfers) {
    const Bytes own(12);
    Bytes got(16);
    issue(transfers, {.what = {.operation = TransferOperation::all_to_all},
                      .outgoing = {{own, {1 - rank}}},
                      .incoming = {{.from = 1 - rank, .bytes = 16, .into = got.data()}}})
        .wait();
  });
  expect_parts(errors, {"sends 12 bytes", "takes 16", "all_to_all"});
}

TEST(TransfersFailure, WhatGrowsHasALimit) {
  TransferRanks ranks(2);
  const auto errors = ranks.each([&](int rank, Transfers& transfers) {
    const Bytes own(12);
    Bytes got;
    issue(transfers, {.what = {.operation = TransferOperation::sparse_all_reduce},
                      .outgoing = {{own, {1 - rank}}},
                      .incoming = {{.from = 1 - rank, .bytes = 11, .growing = &got}}})
        .wait();
  });
  expect_parts(errors, {"sends 12 bytes", "takes at most 11"});
}

TEST(TransfersFailure, ALateRankIsNamedWithTheOperation) {
  constexpr int kRanks = 3;
  TransferRanks ranks(kRanks);
  const auto errors = ranks.each([](int rank, Transfers& transfers) {
    std::vector<std::int32_t> values(10);
    if (rank == 1) {
      Bytes never(1);
      want(transfers, 0, never).wait();  // it learns of the end here
    } else {
      all_reduce(transfers, kRanks, values, milliseconds(300)).wait();
    }
  });
  expect_parts(errors, {"rank 1", "late at all_reduce 1", "did not come to it"});
}

TEST(TransfersFailure, AMessageThatDoesNotComeFailsOnlyItself) {
  TransferRanks ranks(2);
  Bytes got(4);
  Ending late = want(ranks[0], 1, got, 5, milliseconds(100));
  EXPECT_THROW(late.wait(), transport::PeerTimeout);
  EXPECT_THROW(want(ranks[0], std::nullopt, got, 5, milliseconds(100)).wait(),
               transport::PeerTimeout);
  // The group goes on.
  ranks.expect_each([](int, Transfers& transfers) { barrier(transfers).wait(); });
}

TEST(TransfersFailure, ARankThatLeavesEndsWhatNeedsItAndNothingElse) {
  TransferRanks ranks(3);
  Bytes got(4);
  Ending in_vain = want(ranks[0], 2, got);
  const Bytes last(4, std::byte{9});
  send(ranks[2], 1, last, 1).wait();
  ranks.close(2);
  EXPECT_THROW(in_vain.wait(), transport::PeerLeft);
  EXPECT_THROW(send(ranks[0], 2, Bytes(4)).wait(), transport::PeerLeft);
  // What it had sent is there, and the others can still talk.
  EXPECT_EQ(want(ranks[1], 2, got, 1).wait(), 2);
  EXPECT_EQ(got, last);
  send(ranks[0], 1, last, 2).wait();
  EXPECT_EQ(want(ranks[1], 0, got, 2).wait(), 0);
  EXPECT_THROW(barrier(ranks[0]).wait(), transport::PeerLeft);
}

// A rank that has all it needs may leave while another one waits for a third.
TEST(TransfersFailure, WhoLeftAfterItsPartOfAReductionIsNotMissed) {
  TransferRanks ranks(3);
  ranks.transfers[0]->close();  // what it sends comes from here
  const std::vector<std::int32_t> own(10, 1);
  const TransferDescription sum{.total = 40,
                                .operation = TransferOperation::all_reduce,
                                .type = ElementType::i32,
                                .combiner = Combiner::sum,
                                .elements = 10};
  const auto message = std::make_shared<const transport::Bytes>(
      write_transfer({.kind = TransferKind::collective}, &sum, std::as_bytes(std::span(own))));
  std::vector<std::int32_t> first(10, 2);
  std::vector<std::int32_t> second(10, 3);
  Ending of_first = all_reduce(ranks[1], 3, first);
  Ending of_second = all_reduce(ranks[2], 3, second);
  ranks.channels[0]->send(1, message);
  of_first.wait();
  ranks.close(1);
  Bytes got(1);
  EXPECT_THROW(want(ranks[2], 1, got).wait(), transport::PeerLeft);  // it knows
  EXPECT_FALSE(of_second.is_over());
  ranks.channels[0]->send(2, message);
  of_second.wait();
  EXPECT_EQ(first, std::vector<std::int32_t>(10, 6));
  EXPECT_EQ(second, std::vector<std::int32_t>(10, 6));
}

TEST(TransfersFailure, ALostRankEndsEverythingOnEveryRank) {
  constexpr int kRanks = 3;
  TransferRanks ranks(kRanks);
  ranks.channels[1]->abort(2, "rank 2 burns");
  const auto errors = ranks.each([](int, Transfers& transfers) {
    for (;;) {
      barrier(transfers).wait();
    }
  });
  expect_parts(errors, {"rank 2 burns"});
}

TEST(TransfersFailure, ALossThatTheOtherChannelKnowsOfIsOne) {
  TransferRanks ranks(2, [](auto& config) {
    if (config.rank == 0) {
      config.lost = [] { return transport::PeerLost(1, "rank 1 burns"); };
    }
  });
  Bytes got(1);
  EXPECT_THROW(want(ranks[0], 1, got).wait(), transport::PeerLost);
  EXPECT_THROW(want(ranks[1], 0, got).wait(), transport::PeerLost);
}

TEST(TransfersFailure, ClosingWaitsForWhatIsUnderWay) {
  TransferRanks ranks(2);
  const Bytes own = pattern(std::size_t{5} << 20, 1);
  std::vector<Bytes> all;
  std::vector<Bytes> theirs;
  Ending first = all_gather(ranks[0], 2, own, all);
  std::thread closing([&] { ranks.close(0); });
  Ending second = all_gather(ranks[1], 2, own, theirs);
  second.wait();
  first.wait();
  closing.join();
  EXPECT_TRUE(all[1] == own && theirs[0] == own);
  EXPECT_THROW(barrier(ranks[0]), ExchangeError);
}

TEST(TransfersFailure, ClosingDoesNotWaitForMessagesThatNobodySends) {
  TransferRanks ranks(2);
  Bytes first(1);
  Bytes second(1);
  Ending of_one = want(ranks[0], 1, first);
  Ending of_any = want(ranks[1], std::nullopt, second);
  // Each would wait for the other to leave.
  ranks.each([&](int rank, Transfers&) { ranks.close(rank); });
  EXPECT_THROW(of_one.wait(), std::runtime_error);
  EXPECT_THROW(of_any.wait(), std::runtime_error);
}

TEST(TransfersFailure, FailingEndsWhatIsUnderWayHere) {
  TransferRanks ranks(2);
  Ending waiting = barrier(ranks[0]);
  ranks[0].fail(std::make_exception_ptr(Interrupted("enough")));
  EXPECT_THROW(waiting.wait(), Interrupted);
  EXPECT_THROW(barrier(ranks[0]), Interrupted);
}

// What rank 1 sends by itself, without a Transfers of its own, is refused; rank 0 says whose it is.
class Hostile : public ::testing::Test {
 protected:
  Hostile() { ranks.transfers[1]->close(); }

  void send(const TransferHeader& header, const TransferDescription* description,
            std::size_t payload) {
    ranks.channels[1]->send(0, std::make_shared<const transport::Bytes>(
                                   write_transfer(header, description, Bytes(payload))));
  }

  void expect_refused(const std::string& why) {
    try {
      Bytes got(1);
      want(ranks[0], 1, got, 99).wait();
      ADD_FAILURE() << "nothing was refused";
    } catch (const std::exception& error) {
      EXPECT_NE(std::string(error.what()).find(why), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("rank 1"), std::string::npos) << error.what();
    }
  }

  TransferRanks ranks{2};
  const TransferDescription gather{
      .total = 100, .operation = TransferOperation::all_gather, .elements = 100};
  const TransferDescription message{.total = 100, .operation = TransferOperation::send, .root = 7};
};

TEST_F(Hostile, Garbage) {
  ranks.channels[1]->send(0, std::make_shared<const transport::Bytes>(Bytes(50)));
  expect_refused("no message of an exact collective");
}

TEST_F(Hostile, ACollectiveOutOfTurn) {
  send({.kind = TransferKind::collective, .number = 5}, &gather, 10);
  expect_refused("sent byte 0 of collective 6 where byte 0 of collective 1 is the next");
}

TEST_F(Hostile, APartThatSkipsBytes) {
  send({.kind = TransferKind::collective}, &gather, 10);
  send({.kind = TransferKind::collective, .offset = 11}, nullptr, 10);
  expect_refused("sent byte 11 of collective 1 where byte 10");
}

TEST_F(Hostile, MoreThanWasAnnounced) {
  send({.kind = TransferKind::collective}, &gather, 60);
  send({.kind = TransferKind::collective, .offset = 60}, nullptr, 60);
  expect_refused("more of collective 1 than it may");
}

TEST_F(Hostile, MoreThanItHasCreditFor) {
  auto large = gather;
  large.total = 1ULL << 60;
  send({.kind = TransferKind::collective}, &large, kTransferChunk);
  for (std::uint64_t at = kTransferChunk; at < 5ULL << 20; at += kTransferChunk) {
    send({.kind = TransferKind::collective, .offset = at}, nullptr, kTransferChunk);
  }
  expect_refused("more of collective 1 than it may");
}

TEST_F(Hostile, AMessageOutOfTurn) {
  send({.kind = TransferKind::message, .number = 1}, &message, 10);
  expect_refused("sent message 1 where 0 is the next");
}

TEST_F(Hostile, APartOfNoMessage) {
  send({.kind = TransferKind::message, .pooled = true, .number = 3}, nullptr, 10);
  expect_refused("not its turn");
}

TEST_F(Hostile, BytesThatNobodyAskedFor) {
  send({.kind = TransferKind::message}, &message, 10);
  expect_refused("more of message 0 than it may");
}

TEST_F(Hostile, MoreThanThePool) {
  auto large = message;
  large.total = 1ULL << 60;
  send({.kind = TransferKind::message, .pooled = true}, &large, kTransferChunk);
  for (std::uint64_t at = kTransferChunk; at <= 17ULL << 20; at += kTransferChunk) {
    send({.kind = TransferKind::message, .pooled = true, .offset = at}, nullptr, kTransferChunk);
  }
  expect_refused("more of message 0 than it may");
}

TEST_F(Hostile, AStreamThatIsNotIts) {
  ranks[0].open(3, {0});
  send({.kind = TransferKind::collective, .stream = 3}, &gather, 10);
  expect_refused("stream 3, which is not its");
}

TEST_F(Hostile, AFaultThatIsNoText) {
  send({.kind = TransferKind::fault}, nullptr, 20);
  expect_refused("\\u0000");
}

}  // namespace
}  // namespace distro::exchange::testing
