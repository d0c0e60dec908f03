#include "transport/session.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "tests/transport/group.h"
#include "tests/transport/impaired_link.h"

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

ChannelConfig session_config() {
  ChannelConfig options = config(Carrier::inproc, 0, 2);
  options.chunk_bytes = 1000;
  options.window_bytes = 20'000;
  options.resend_after = milliseconds(100);
  return options;
}

// Two sessions joined by impaired links, in simulated time.
struct Pair {
  Pair(const ChannelConfig& options, const Impairment& impairment, std::uint64_t seed)
      : sessions{Session(options, 11, 22), Session(options, 22, 11)},
        links{ImpairedLink(impairment, seed), ImpairedLink(impairment, seed + 1)} {
    reconnect();
  }

  void reconnect() {
    for (auto& link : links) {
      link.cut();
    }
    const FrameHeader hello = sessions[0].header(FrameKind::hello);
    const FrameHeader welcome = sessions[1].header(FrameKind::welcome);
    EXPECT_TRUE(sessions[0].connected(welcome, now));
    EXPECT_TRUE(sessions[1].connected(hello, now));
  }

  void step() {
    now += milliseconds(1);
    for (std::size_t side = 0; side < 2; ++side) {
      while (const auto bytes = links[side].receive(now)) {
        const auto parsed = parse_frame(*bytes, 1000);
        ASSERT_TRUE(parsed.frame) << parsed.error;
        const Verdict verdict = sessions[1 - side].accept(*parsed.frame, now);
        ASSERT_NE(verdict, Verdict::violation) << sessions[1 - side].violation();
        ASSERT_NE(verdict, Verdict::stale);
        while (auto message = sessions[1 - side].take()) {
          received[1 - side].push_back(std::move(*message));
        }
      }
      while (const auto frame = sessions[side].next_frame(now)) {
        Bytes bytes(kHeaderBytes + frame->payload.size());
        encode_frame(*frame, bytes);
        resent += sessions[side].sent(*frame, now) ? 1 : 0;
        ++frames;
        links[side].send(std::move(bytes), now);
      }
    }
  }

  bool idle() const { return sessions[0].all_acknowledged() && sessions[1].all_acknowledged(); }

  Deadline now{seconds(1000)};
  Session sessions[2];
  ImpairedLink links[2];  // links[i] carries what sessions[i] sends
  std::vector<Bytes> received[2];
  int frames = 0;
  int resent = 0;
};

// Random messages both ways over one impaired link; every one arrives once, in order, unchanged.
void exchange(const Impairment& impairment, int cuts, std::uint64_t seed) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  Pair pair(session_config(), impairment, seed);
  std::mt19937_64 random(seed);
  std::vector<Bytes> sent[2];
  for (std::uint64_t number = 0; number < 40; ++number) {
    for (std::size_t side = 0; side < 2; ++side) {
      sent[side].push_back(pattern(random() % 6000, 2 * number + side));
      pair.sessions[side].queue(std::make_shared<const Bytes>(sent[side].back()));
    }
  }
  int steps = 0;
  for (; steps < 200'000 && !pair.idle() && !testing::Test::HasFatalFailure(); ++steps) {
    pair.step();
    if (cuts > 0 && steps % 30 == 17) {
      --cuts;
      pair.reconnect();
    }
  }
  ASSERT_TRUE(pair.idle()) << "not delivered after " << steps << " simulated ms";
  EXPECT_TRUE(pair.received[1] == sent[0]);
  EXPECT_TRUE(pair.received[0] == sent[1]);
}

TEST(Session, DeliversOverAnyLink) {
  const std::uint64_t seed = test_seed();
  for (std::uint64_t round = 0; round < 5; ++round) {
    exchange({}, 0, seed + round);
    exchange({0.05, 0, 0}, 0, seed + round);
    exchange({0, 0.3, 0}, 0, seed + round);
    exchange({0, 0, 0.3}, 0, seed + round);
    exchange({0, 0, 0}, 8, seed + round);
    exchange({0.1, 0.1, 0.1}, 4, seed + round);
  }
}

TEST(Session, CleanLinkNeedsNoResendAndFewAcks) {
  Pair pair(session_config(), {}, 1);
  pair.sessions[0].queue(shared_pattern(100'000, 1));
  for (int i = 0; i < 400; ++i) {
    pair.step();
  }
  ASSERT_EQ(pair.received[1].size(), 1U);
  EXPECT_EQ(pair.resent, 0);
  EXPECT_TRUE(pair.idle());
  EXPECT_LE(pair.frames, 100 + 100 / 4 + 2);  // chunks, and an ack for each four
}

TEST(Session, AckLeavesWithinTwentyMilliseconds) {
  Session session(session_config(), 1, 2);
  const Deadline now{seconds(1000)};
  ASSERT_TRUE(session.connected({FrameKind::welcome, 0, 2, 0, 0}, now));
  const Bytes part = pattern(10, 1);
  ASSERT_EQ(session.accept({{FrameKind::data, kFlagFirst, 2, 0, 0}, part}, now), Verdict::accepted);
  EXPECT_FALSE(session.next_frame(now + milliseconds(19)));
  const auto ack = session.next_frame(now + milliseconds(20));
  ASSERT_TRUE(ack);
  EXPECT_EQ(ack->header.kind, FrameKind::ack);
  EXPECT_EQ(ack->header.ack, 1U);
}

TEST(Session, WindowBoundsWhatIsInFlight) {
  Session session(session_config(), 1, 2);
  const Deadline now{seconds(1000)};
  ASSERT_TRUE(session.connected({FrameKind::welcome, 0, 2, 0, 0}, now));
  session.queue(shared_pattern(100'000, 1));
  std::size_t bytes = 0;
  while (const auto frame = session.next_frame(now)) {
    bytes += kHeaderBytes + frame->payload.size();
    session.sent(*frame, now);
  }
  EXPECT_LE(bytes, 20'000U);
  EXPECT_GT(bytes, 18'000U);
}

TEST(Session, HostileNumbersAreStale) {
  Session session(session_config(), 1, 2);
  const Deadline now{seconds(1000)};
  ASSERT_TRUE(session.connected({FrameKind::welcome, 0, 2, 0, 0}, now));
  const auto verdict = [&](std::uint64_t its_session, std::uint64_t sequence, std::uint64_t ack) {
    return session.accept(
        {{FrameKind::data, kFlagFirst | kFlagLast, its_session, sequence, ack}, {}}, now);
  };
  EXPECT_EQ(verdict(3, 0, 0), Verdict::stale);                  // another session
  EXPECT_EQ(verdict(2, 0, 1), Verdict::stale);                  // acknowledges what was never sent
  EXPECT_EQ(verdict(2, 1'000'000, 0), Verdict::stale);          // far ahead
  EXPECT_EQ(verdict(2, ~std::uint64_t{0}, 0), Verdict::stale);  // farther
  EXPECT_EQ(verdict(2, 3, 0), Verdict::gap);
  EXPECT_EQ(verdict(2, 0, 0), Verdict::accepted);
  EXPECT_EQ(verdict(2, 0, 0), Verdict::duplicate);
  EXPECT_FALSE(session.connected({FrameKind::welcome, 0, 2, 0, 5}, now));
}

TEST(Session, BrokenMessagesAreViolations) {
  ChannelConfig options = session_config();
  options.max_message_bytes = 1500;
  const Deadline now{seconds(1000)};
  const Bytes part = pattern(1000, 1);
  const auto last_verdict = [&](std::initializer_list<FrameHeader> headers) {
    Session session(options, 1, 2);
    Verdict verdict = Verdict::accepted;
    for (const FrameHeader& header : headers) {
      EXPECT_EQ(verdict, Verdict::accepted);
      const bool is_data = header.kind == FrameKind::data;
      verdict = session.accept(
          {header, is_data ? std::span<const std::byte>(part) : std::span<const std::byte>()}, now);
    }
    return verdict;
  };
  constexpr auto kData = FrameKind::data;
  constexpr auto kBye = FrameKind::goodbye;
  EXPECT_EQ(last_verdict({{kData, 0, 2, 0, 0}}), Verdict::violation);
  EXPECT_EQ(last_verdict({{kData, kFlagFirst, 2, 0, 0}, {kData, kFlagFirst, 2, 1, 0}}),
            Verdict::violation);
  EXPECT_EQ(last_verdict({{kData, kFlagFirst, 2, 0, 0}, {kData, kFlagLast, 2, 1, 0}}),
            Verdict::violation);  // too large
  EXPECT_EQ(last_verdict({{kData, kFlagFirst, 2, 0, 0}, {kBye, 0, 2, 1, 0}}), Verdict::violation);
  EXPECT_EQ(last_verdict({{kBye, 0, 2, 0, 0}, {kBye, 0, 2, 1, 0}}), Verdict::violation);
  EXPECT_EQ(last_verdict({{kData, kFlagFirst | kFlagLast, 2, 0, 0}, {kBye, 0, 2, 1, 0}}),
            Verdict::accepted);
}

TEST(Session, HeldPeerProbesAndResumes) {
  Session session(session_config(), 1, 2);
  Deadline now{seconds(1000)};
  ASSERT_TRUE(session.connected({FrameKind::welcome, kFlagHold, 2, 0, 0}, now));
  session.queue(shared_pattern(5'000, 1));
  EXPECT_FALSE(session.next_frame(now));
  now += milliseconds(100);
  const auto probe = session.next_frame(now);
  ASSERT_TRUE(probe);
  session.sent(*probe, now);
  EXPECT_FALSE(session.next_frame(now));
  ASSERT_EQ(session.accept({{FrameKind::ack, 0, 2, 0, 1}, {}}, now), Verdict::accepted);
  EXPECT_TRUE(session.next_frame(now));
}

}  // namespace
}  // namespace distro::transport::test
