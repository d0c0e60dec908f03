#include "transport/pacer.h"

#include <gtest/gtest.h>

#include <chrono>

#include "tests/transport/group.h"

namespace distro::transport::test {
namespace {

using std::chrono::microseconds;
using std::chrono::seconds;

constexpr std::uint64_t kRate = 1'000'000;
constexpr std::size_t kFrame = 10'000;
const Deadline kBegin{seconds(1000)};

TEST(Pacer, WithoutARateEverythingGoesAtOnce) {
  Pacer pacer;
  for (int frame = 0; frame < 1000; ++frame) {
    EXPECT_TRUE(pacer.take(kFrame, Priority::exact, kBegin));
  }
}

TEST(Pacer, KeepsTheRateAndSendsNoBursts) {
  Pacer pacer;
  pacer.set_rate(kRate, kBegin);
  std::size_t sent = 0;
  std::size_t in_a_row = 0;
  for (Deadline now = kBegin; now < kBegin + seconds(10); now += microseconds(500)) {
    in_a_row = 0;
    while (pacer.take(kFrame, Priority::exact, now)) {
      sent += kFrame;
      ++in_a_row;
    }
    EXPECT_LE(in_a_row, 1U);
  }
  EXPECT_GE(sent, 10 * kRate - 2 * kFrame);
  EXPECT_LE(sent, 10 * kRate + 2 * kFrame);
}

TEST(Pacer, AnIdleTimeIsNotMadeUpFor) {
  Pacer pacer;
  pacer.set_rate(kRate, kBegin);
  const Deadline later = kBegin + seconds(3600);
  std::size_t frames = 0;
  while (pacer.take(kFrame, Priority::exchange, later)) {
    ++frames;
  }
  EXPECT_EQ(frames, 1U);
  EXPECT_LE(pacer.ready_at(Priority::exchange, later), later + milliseconds(10));
}

TEST(Pacer, AnExchangeGoesBeforeExactTransfersThatWaitLonger) {
  Pacer pacer;
  pacer.set_rate(kRate, kBegin);
  Deadline now = kBegin;
  ASSERT_TRUE(pacer.take(kFrame, Priority::exact, now));
  ASSERT_FALSE(pacer.take(kFrame, Priority::exact, now));
  ASSERT_FALSE(pacer.take(kFrame, Priority::exchange, now));
  now = pacer.ready_at(Priority::exchange, now);
  EXPECT_LE(now, kBegin + milliseconds(11));
  EXPECT_FALSE(pacer.take(kFrame, Priority::exact, now));  // though it asks first
  EXPECT_TRUE(pacer.take(kFrame, Priority::exchange, now));
  now = pacer.ready_at(Priority::exact, now);
  EXPECT_TRUE(pacer.take(kFrame, Priority::exact, now));
}

TEST(Pacer, AnExchangeThatIsGivenUpHoldsNobodyUp) {
  Pacer pacer;
  pacer.set_rate(kRate, kBegin);
  ASSERT_TRUE(pacer.take(kFrame, Priority::exact, kBegin));
  ASSERT_FALSE(pacer.take(kFrame, Priority::exchange, kBegin));  // and it never comes back
  EXPECT_TRUE(pacer.take(kFrame, Priority::exact, pacer.ready_at(Priority::exact, kBegin)));
}

TEST(Pacer, WhatTheCarrierDidNotTakeIsFree) {
  Pacer pacer;
  pacer.set_rate(kRate, kBegin);
  ASSERT_TRUE(pacer.take(kFrame, Priority::exact, kBegin));
  pacer.give_back(kFrame);
  EXPECT_TRUE(pacer.take(kFrame, Priority::exact, kBegin));
}

// Messages of an exchange travel beside a large exact transfer of the same process.
TEST(Pacer, PacesAChannelOfEachKind) {
  const auto paced = [](Priority priority, std::uint64_t number) {
    return [=](ChannelConfig& options) {
      options.group = number;
      options.priority = priority;
      options.rate_limit_bytes = 20'000'000;
    };
  };
  Group exact(Carrier::tcp, 2, paced(Priority::exact, 1));
  Group records(Carrier::tcp, 2, paced(Priority::exchange, 2));
  const SharedBytes large = shared_pattern(10'000'000, 1);
  const auto began = Clock::now();
  exact[0].send(1, large);
  for (std::uint64_t number = 0; number < 20; ++number) {
    records[0].send(1, shared_pattern(1'000, number));
    EXPECT_TRUE(records[1].receive(0, in(seconds(10))) == pattern(1'000, number));
  }
  EXPECT_FALSE(exact[1].try_receive(0)) << "the records waited for all of the large transfer";
  EXPECT_TRUE(exact[1].receive(0, in(seconds(20))) == *large);
  // Its bytes at the rate; a limit that is not kept would need a hundredth of it.
  EXPECT_GE(Clock::now() - began, milliseconds(400));
  exact.close_all();
  records.close_all();
}

}  // namespace
}  // namespace distro::transport::test
