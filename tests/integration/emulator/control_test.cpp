#include "integration/emulator/control.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/integration/emulator/packets.h"

namespace distro::emulator::test {
namespace {

using Json = nlohmann::json;
using std::chrono::seconds;

class Control : public testing::Test {
 protected:
  Json tell(const std::string& command) { return Json::parse(execute(command, network_, now_)); }
  std::size_t arrivals(Time until) {
    std::size_t count = 0;
    network_.advance(until, [&](std::size_t, std::span<const std::byte>) { ++count; });
    return count;
  }
  void send() {
    network_.send(0, packet_of({1, 2, 3, 4, kUdp}, 100), now_);
    network_.send(1, packet_of({2, 3, 3, 4, kUdp}, 100), now_);
  }

  Network network_{{1, 2, 3}, 64, 1};
  Time now_ = seconds(10);
};

TEST_F(Control, SetChangesWhatIsNamedAndNothingElse) {
  EXPECT_EQ(tell(R"({"do": "set", "host": 1, "up_mbit": 10, "loss": 0.5, "nat": true})"),
            Json::object());
  EXPECT_EQ(tell(R"({"do": "set", "host": 1, "delay_ms": 20.5})"), Json::object());
  const Line& line = network_.line(1);
  EXPECT_EQ(line.up_mbit, 10);
  EXPECT_EQ(line.loss, 0.5);
  EXPECT_TRUE(line.nat);
  EXPECT_EQ(line.delay_ms, 20.5);
  EXPECT_EQ(line.down_mbit, 0);
  EXPECT_EQ(network_.line(0).delay_ms, 0);
}

TEST_F(Control, CutsALineOrAPairForATimeAndMendsIt) {
  tell(R"({"do": "cut", "host": 0, "seconds": 5})");
  send();
  EXPECT_EQ(arrivals(seconds(11)), 1U);
  tell(R"({"do": "cut", "host": 0, "seconds": 0})");
  tell(R"({"do": "cut", "host": 1, "peer": 2, "seconds": 5})");
  send();
  EXPECT_EQ(arrivals(seconds(12)), 1U);
  now_ = seconds(15);
  send();
  EXPECT_EQ(arrivals(seconds(16)), 2U);
}

TEST_F(Control, CountersOfAllHosts) {
  send();
  arrivals(seconds(11));
  const Json hosts = tell(R"({"do": "counters"})").at("hosts");
  ASSERT_EQ(hosts.size(), 3U);
  EXPECT_EQ(hosts[0].at("sent_packets"), 1);
  EXPECT_EQ(hosts[0].at("sent_bytes"), 100);
  EXPECT_EQ(hosts[1].at("received_bytes"), 100);
  EXPECT_EQ(hosts[2].at("received_packets"), 1);
}

TEST_F(Control, AnAddressOfAnotherHostIsRefused) {
  EXPECT_EQ(tell(R"({"do": "set", "host": 0, "address": "10.0.0.9"})"), Json::object());
  const Json answer = tell(R"({"do": "set", "host": 0, "address": "0.0.0.2", "loss": 1})");
  EXPECT_TRUE(answer.contains("error"));
  EXPECT_EQ(network_.line(0).loss, 0);
}

TEST_F(Control, WhatIsWrongIsSaidAndChangesNothing) {
  for (const char* const command :
       {"",
        "{",
        "[]",
        "1",
        R"({"do": 3})",
        R"({"do": "dance"})",
        R"({"do": "set"})",
        R"({"do": "set", "host": 3, "loss": 0.1})",
        R"({"do": "set", "host": -1})",
        R"({"do": "set", "host": 0, "loss": 1.5})",
        R"({"do": "set", "host": 0, "loss": -0.1})",
        R"({"do": "set", "host": 0, "loss": "much"})",
        R"({"do": "set", "host": 0, "up": 3})",
        R"({"do": "set", "host": 0, "loss": 0.5, "nat": 1})",
        R"({"do": "set", "host": 0, "loss": 0.5, "address": "somewhere"})",
        R"({"do": "cut", "host": 0})",
        R"({"do": "cut", "host": 0, "seconds": 1e300})",
        R"({"do": "cut", "host": 0, "peer": 9, "seconds": 1})",
        "\xff\xfe",
        R"({"do": "set", "host": 0, "delay_ms": 1e999})"}) {
    EXPECT_TRUE(tell(command).contains("error")) << command;
  }
  EXPECT_EQ(network_.line(0).loss, 0);
  send();
  EXPECT_EQ(arrivals(seconds(11)), 2U);
}

}  // namespace
}  // namespace distro::emulator::test
