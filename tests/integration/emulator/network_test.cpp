#include "integration/emulator/network.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "tests/integration/emulator/packets.h"
#include "tests/seed.h"

namespace distro::emulator::test {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr Address kFirst = 0x0a4e0001;
constexpr std::size_t kHosts = 3;
constexpr std::size_t kBytes = 1000;

struct Arrival {
  Time at;
  std::size_t host;
  int mark;
};

class Internet {
 public:
  explicit Internet(std::size_t capacity = 4096, std::uint64_t seed = 1)
      : network({kFirst, kFirst + 1, kFirst + 2}, capacity, seed) {}

  static Flow flow(std::size_t from, std::size_t to, std::uint16_t port = 7) {
    return {kFirst + static_cast<Address>(from), kFirst + static_cast<Address>(to), port, 9, kUdp};
  }
  void send(std::size_t from, std::size_t to, Time at, int mark = 0, std::uint16_t port = 7) {
    network.send(from, packet_of(flow(from, to, port), kBytes, static_cast<std::uint8_t>(mark)),
                 at);
  }
  /// All that arrives until then, each at its own time.
  std::vector<Arrival> until(Time end) {
    std::vector<Arrival> arrivals;
    while (network.next() && *network.next() <= end) {
      const Time now = *network.next();
      network.advance(now, [&](std::size_t host, std::span<const std::byte> packet) {
        EXPECT_EQ(packet.size(), kBytes);
        arrivals.push_back({now, host, std::to_integer<int>(packet.back())});
      });
    }
    return arrivals;
  }

  Network network;
};

Line line(double mbit, double delay_ms) {
  Line line;
  line.up_mbit = line.down_mbit = mbit;
  line.delay_ms = delay_ms;
  return line;
}

TEST(Network, APacketArrivesAfterBothDelaysAtItsAddressOnly) {
  Internet internet;
  internet.network.set_line(0, line(0, 20));
  internet.network.set_line(1, line(0, 30));
  internet.send(0, 1, milliseconds(5), 42);
  const auto arrivals = internet.until(seconds(1));
  ASSERT_EQ(arrivals.size(), 1U);
  EXPECT_EQ(arrivals[0].at, milliseconds(55));
  EXPECT_EQ(arrivals[0].host, 1U);
  EXPECT_EQ(arrivals[0].mark, 42);
}

TEST(Network, ALineCarriesItsRate) {
  Internet internet;
  Line own = line(8, 0);  // 1000 bytes a millisecond
  own.queue_ms = 1000;
  internet.network.set_line(0, own);
  for (int i = 0; i < 100; ++i) {
    internet.send(0, 1, seconds(1), i);
  }
  const auto arrivals = internet.until(seconds(10));
  ASSERT_EQ(arrivals.size(), 100U);
  EXPECT_NEAR(std::chrono::duration<double>(arrivals.back().at - seconds(1)).count(), 0.1, 0.002);
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(arrivals[static_cast<std::size_t>(i)].mark, i);
  }
}

TEST(Network, TheSlowerOfTwoLinesDecides) {
  Internet internet;
  Line fast = line(80, 0);
  Line slow = line(8, 0);
  fast.queue_ms = slow.queue_ms = 1000;
  internet.network.set_line(0, fast);
  internet.network.set_line(1, slow);
  for (int i = 0; i < 100; ++i) {
    internet.send(0, 1, seconds(1));
  }
  const auto arrivals = internet.until(seconds(10));
  ASSERT_EQ(arrivals.size(), 100U);
  EXPECT_NEAR(std::chrono::duration<double>(arrivals.back().at - seconds(1)).count(), 0.1, 0.003);
}

TEST(Network, WhatFindsTheQueueFullIsDroppedAndCounted) {
  Internet internet;
  Line own = line(8, 0);
  own.queue_ms = 10;  // ten of our packets
  internet.network.set_line(0, own);
  for (int i = 0; i < 100; ++i) {
    internet.send(0, 1, seconds(1));
  }
  const auto counters = internet.network.counters(0);
  EXPECT_GE(counters.sent_packets, 10U);
  EXPECT_LE(counters.sent_packets, 12U);
  EXPECT_EQ(counters.sent_packets + counters.dropped_up, 100U);
  EXPECT_EQ(counters.sent_bytes, counters.sent_packets * kBytes);
  EXPECT_EQ(internet.until(seconds(10)).size(), counters.sent_packets);
  EXPECT_EQ(internet.network.counters(1).received_packets, counters.sent_packets);
}

TEST(Network, AQueueOfBytesWinsAndTheDownLinkHasItsOwn) {
  Internet internet;
  Line own = line(8, 0);
  own.queue_bytes = 5 * kBytes;
  internet.network.set_line(1, own);
  for (int i = 0; i < 100; ++i) {
    internet.send(0, 1, seconds(1));
  }
  const auto received = internet.until(seconds(10)).size();
  EXPECT_GE(received, 5U);
  EXPECT_LE(received, 7U);
  EXPECT_EQ(internet.network.counters(1).dropped_down, 100 - received);
}

TEST(Network, APacketLongerThanTheQueuePassesAnIdleLine) {
  Internet internet;
  Line own = line(0.1, 0);
  own.queue_bytes = 1;
  internet.network.set_line(0, own);
  internet.send(0, 1, seconds(1));
  EXPECT_EQ(internet.until(seconds(10)).size(), 1U);
}

TEST(Network, ANewRateKeepsTheOrderOfWhatWaits) {
  Internet internet;
  internet.network.set_line(0, line(1, 0));
  for (int i = 0; i < 5; ++i) {
    internet.send(0, 1, seconds(1), i);
  }
  internet.network.set_line(0, line(0, 0));
  internet.send(0, 1, seconds(1), 5);
  const auto arrivals = internet.until(seconds(10));
  ASSERT_EQ(arrivals.size(), 6U);
  EXPECT_EQ(arrivals.back().mark, 5);
}

TEST(Network, LossIsDrawnBySeedInEachDirectionAndCounted) {
  const auto seed = distro::test::seed();
  SCOPED_TRACE(testing::Message() << "TEST_SEED=" << seed);
  const auto run = [&](std::uint64_t with) {
    Internet internet(4096, with);
    Line own = line(0, 1);
    own.loss = 0.1;
    internet.network.set_line(0, own);
    std::vector<int> marks;
    for (int i = 0; i < 2000; ++i) {
      internet.send(0, 1, milliseconds(i), i % 251);
      internet.send(1, 0, milliseconds(i), i % 251);
    }
    for (const auto& arrival : internet.until(seconds(100))) {
      marks.push_back(arrival.mark);
    }
    const auto counters = internet.network.counters(0);
    EXPECT_EQ(counters.lost_up + internet.network.counters(1).received_packets, 2000U);
    EXPECT_EQ(counters.lost_down + counters.received_packets, 2000U);
    EXPECT_EQ(internet.network.counters(1).lost_up + internet.network.counters(1).lost_down, 0U);
    // Nine standard deviations around 200.
    EXPECT_NEAR(static_cast<double>(counters.lost_up), 200, 120);
    EXPECT_NEAR(static_cast<double>(counters.lost_down), 200, 120);
    return marks;
  };
  const auto marks = run(seed);
  EXPECT_EQ(marks, run(seed));
  EXPECT_NE(marks, run(seed + 1));
}

TEST(Network, JitterDelaysWithoutReordering) {
  Internet internet;
  Line own = line(0, 10);
  own.jitter_ms = 20;
  internet.network.set_line(0, own);
  for (int i = 0; i < 200; ++i) {
    internet.send(0, 1, milliseconds(i), i);
  }
  const auto arrivals = internet.until(seconds(10));
  ASSERT_EQ(arrivals.size(), 200U);
  Time longest{0};
  for (int i = 0; i < 200; ++i) {
    const auto& arrival = arrivals[static_cast<std::size_t>(i)];
    EXPECT_EQ(arrival.mark, i);
    const Time took = arrival.at - milliseconds(i);
    EXPECT_GE(took, milliseconds(10));
    EXPECT_LE(took, milliseconds(30));
    longest = std::max(longest, took);
  }
  EXPECT_GT(longest, milliseconds(20));
}

TEST(Network, ReorderedPacketsAreOvertakenAndDuplicatesArriveTwice) {
  Internet internet;
  Line own = line(0, 10);
  own.reorder = 0.2;
  own.duplicate = 0.1;
  internet.network.set_line(0, own);
  for (int i = 0; i < 200; ++i) {
    internet.send(0, 1, milliseconds(i), i);
  }
  const auto arrivals = internet.until(seconds(10));
  const auto counters = internet.network.counters(0);
  EXPECT_GT(counters.reordered, 0U);
  EXPECT_GT(counters.duplicated, 0U);
  ASSERT_EQ(arrivals.size(), 200 + counters.duplicated);
  EXPECT_FALSE(std::is_sorted(arrivals.begin(), arrivals.end(),
                              [](const Arrival& a, const Arrival& b) { return a.mark < b.mark; }));
  std::vector<int> times(200);
  for (const auto& arrival : arrivals) {
    ++times[static_cast<std::size_t>(arrival.mark)];
  }
  EXPECT_TRUE(std::all_of(times.begin(), times.end(), [](int n) { return n == 1 || n == 2; }));
}

TEST(Network, ACutLineLosesWhatIsUnderWayAndIsWholeAfterwards) {
  Internet internet;
  internet.network.set_line(0, line(0, 10));
  internet.send(1, 0, seconds(1));  // arrives in the cut
  internet.network.cut(0, seconds(3));
  internet.send(0, 1, seconds(2));
  internet.send(1, 0, seconds(2));
  internet.send(1, 2, seconds(2), 9);  // not the host's
  auto arrivals = internet.until(seconds(2) + milliseconds(900));
  ASSERT_EQ(arrivals.size(), 1U);
  EXPECT_EQ(arrivals[0].mark, 9);
  EXPECT_EQ(internet.network.counters(0).cut_up, 1U);
  EXPECT_EQ(internet.network.counters(0).cut_down, 2U);
  internet.send(0, 1, seconds(3));
  EXPECT_EQ(internet.until(seconds(9)).size(), 1U);
}

TEST(Network, ACutPairStillReachesTheOthers) {
  Internet internet;
  internet.network.cut(0, 1, seconds(3));
  internet.send(0, 1, seconds(1));
  internet.send(1, 0, seconds(1));
  internet.send(0, 2, seconds(1));
  internet.send(1, 2, seconds(1));
  EXPECT_EQ(internet.until(seconds(2)).size(), 2U);
  internet.send(0, 1, seconds(3));
  EXPECT_EQ(internet.until(seconds(4)).size(), 1U);
}

TEST(Network, NatLetsOnlyAnswersIn) {
  Internet internet;
  Line home;
  home.nat = true;
  internet.network.set_line(0, home);
  internet.network.send(1, packet_of(Internet::flow(1, 0), kBytes), seconds(1));
  EXPECT_TRUE(internet.until(seconds(2)).empty());
  EXPECT_EQ(internet.network.counters(0).refused, 1U);

  const Flow opened = Internet::flow(0, 1, 77);
  internet.network.send(0, packet_of(opened, kBytes), seconds(3));
  EXPECT_EQ(internet.until(seconds(4)).size(), 1U);
  internet.network.send(1, packet_of(opened.reversed(), kBytes), seconds(4));
  EXPECT_EQ(internet.until(seconds(5)).size(), 1U);
  // Another port, another protocol, another host.
  Flow other = opened.reversed();
  ++other.destination_port;
  internet.network.send(1, packet_of(other, kBytes), seconds(5));
  other = opened.reversed();
  other.protocol = kTcp;
  internet.network.send(1, packet_of(other, kBytes), seconds(5));
  other = opened.reversed();
  other.source = kFirst + 2;
  internet.network.send(2, packet_of(other, kBytes), seconds(5));
  EXPECT_TRUE(internet.until(seconds(6)).empty());
  EXPECT_EQ(internet.network.counters(0).refused, 4U);
  // What rested too long is forgotten.
  internet.network.send(1, packet_of(opened.reversed(), kBytes), seconds(1000));
  EXPECT_TRUE(internet.until(seconds(1001)).empty());
}

TEST(Network, NatLetsTheEchoOfAPingInAndKeepsItsMemoryBounded) {
  Internet internet;
  Line home;
  home.nat = true;
  internet.network.set_line(0, home);
  const Flow ping{kFirst, kFirst + 1, 5, 5, kIcmp};
  internet.network.send(0, packet_of(ping, kBytes), seconds(1));
  internet.network.send(1, packet_of(ping.reversed(), kBytes), seconds(1));
  EXPECT_EQ(internet.until(seconds(2)).size(), 2U);
  // More flows than a router remembers: the newest still work.
  for (int port = 1; port < 60'000; ++port) {
    internet.send(0, 1, seconds(3) + microseconds(port), 0, static_cast<std::uint16_t>(port));
    internet.until(seconds(3) + microseconds(port));
  }
  internet.network.send(1, packet_of(Internet::flow(0, 1, 59'999).reversed(), kBytes), seconds(4));
  EXPECT_EQ(internet.until(seconds(4)).size(), 1U);
}

TEST(Network, AChangedAddressIsReachedInsteadOfTheOld) {
  Internet internet;
  internet.network.set_line(0, line(0, 10));
  internet.send(1, 0, seconds(1));  // under way
  internet.network.set_address(0, kFirst + 7);
  internet.send(1, 0, seconds(1));
  internet.send(0, 1, seconds(1));  // from the old one
  EXPECT_TRUE(internet.until(seconds(2)).empty());
  EXPECT_EQ(internet.network.counters(0).unroutable, 2U);
  EXPECT_EQ(internet.network.counters(1).unroutable, 1U);
  Flow moved = Internet::flow(1, 0);
  moved.destination = kFirst + 7;
  internet.network.send(1, packet_of(moved, kBytes), seconds(3));
  internet.network.send(0, packet_of(moved.reversed(), kBytes), seconds(3));
  EXPECT_EQ(internet.until(seconds(4)).size(), 2U);
  EXPECT_THROW(internet.network.set_address(0, kFirst + 1), std::invalid_argument);
}

TEST(Network, WhatIsNoPacketOrGoesToNobodyIsCounted) {
  Internet internet;
  Packet packet = packet_of(Internet::flow(0, 1), 100);
  packet[0] = std::byte{0x60};  // IPv6
  internet.network.send(0, packet, seconds(1));
  packet[0] = std::byte{0x4f};  // a longer header than the packet
  internet.network.send(0, std::span(packet).first(40), seconds(1));
  packet[0] = std::byte{0x45};
  internet.network.send(0, std::span(packet).first(99), seconds(1));  // not its length
  internet.network.send(0, std::span(packet).first(3), seconds(1));
  EXPECT_EQ(internet.network.counters(0).malformed, 4U);
  internet.network.send(0, packet_of(Internet::flow(0, 9), 100), seconds(1));
  EXPECT_EQ(internet.network.counters(0).unroutable, 1U);
  EXPECT_FALSE(internet.network.next());
}

TEST(Network, RandomBytesAreNeverDeliveredWithoutARoute) {
  const auto seed = distro::test::seed();
  SCOPED_TRACE(testing::Message() << "TEST_SEED=" << seed);
  std::mt19937 random(seed);
  Internet internet;
  Line home;
  home.nat = true;
  internet.network.set_line(0, home);
  for (int i = 0; i < 20'000; ++i) {
    Packet packet(random() % 80);
    std::generate(packet.begin(), packet.end(), [&] { return static_cast<std::byte>(random()); });
    if (packet.size() >= 20 && i % 2 == 0) {
      packet.resize(packet.size() + 28);
      packet = packet_of(Internet::flow(0, 1), packet.size());
      packet[random() % packet.size()] = static_cast<std::byte>(random());
    }
    internet.network.send(0, packet, seconds(1));
  }
  internet.network.advance(seconds(2), [](std::size_t host, std::span<const std::byte> packet) {
    const auto flow = parse(packet);
    ASSERT_TRUE(flow);
    EXPECT_EQ(flow->destination, kFirst + host);
  });
  EXPECT_GT(internet.network.counters(0).malformed, 0U);
}

TEST(Network, PacketsBeyondItsMemoryAreDropped) {
  Internet internet(10);
  internet.network.set_line(0, line(0, 10));
  for (int i = 0; i < 25; ++i) {
    internet.send(0, 1, seconds(1));
  }
  EXPECT_EQ(internet.network.counters(0).dropped_up, 15U);
  EXPECT_EQ(internet.until(seconds(2)).size(), 10U);
  internet.send(0, 1, seconds(3));
  EXPECT_EQ(internet.until(seconds(4)).size(), 1U);
}

}  // namespace
}  // namespace distro::emulator::test
