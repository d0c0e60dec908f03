#include "transport/plugin.h"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>
#include <zmq.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "tests/transport/group.h"
#include "transport/channel.h"
#include "transport/frame.h"

// Made up by this file: what a library's channel would be.
struct distro_transport_channel {
  int fd;
};

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

// A transport that works just so far that a channel opens; each test breaks one promise of it.
distro_transport_channel the_channel{-1};
distro_transport_event next_event{};
int opened = 0;
int closed = 0;

distro_transport sound_table() {
  distro_transport table{};
  table.abi = DISTRO_TRANSPORT_ABI;
  table.struct_size = sizeof table;
  table.name = "fake";
  table.version = "0";
  table.open = [](const distro_transport_config*, distro_transport_channel** channel,
                  distro_transport_error*) -> std::int32_t {
    ++opened;
    *channel = &the_channel;
    return DISTRO_TRANSPORT_OK;
  };
  table.address = [](distro_transport_channel*) { return "here"; };
  // Always readable, as a library's epoll instance is that has something to tell.
  table.poll_fd = [](distro_transport_channel* channel) { return channel->fd; };
  table.connect = [](distro_transport_channel*, const char* const*,
                     distro_transport_error*) -> std::int32_t { return DISTRO_TRANSPORT_OK; };
  table.send = [](distro_transport_channel*, std::int32_t, const void*, std::size_t,
                  distro_transport_error*) -> std::int32_t { return DISTRO_TRANSPORT_OK; };
  table.receive = [](distro_transport_channel*, distro_transport_event* event,
                     distro_transport_error*) -> std::int32_t {
    const std::size_t size = event->struct_size;
    *event = next_event;
    event->struct_size = size;
    return event->kind == 0 ? DISTRO_TRANSPORT_AGAIN : DISTRO_TRANSPORT_OK;
  };
  table.close = [](distro_transport_channel*, std::int64_t) { ++closed; };
  return table;
}

class FakePlugin : public testing::Test {
 protected:
  FakePlugin() {
    int ends[2] = {-1, -1};
    EXPECT_EQ(::pipe(ends), 0);
    the_channel.fd = ends[0];
    write_end_ = ends[1];
    EXPECT_EQ(::write(write_end_, "x", 1), 1);
    next_event = {};
    opened = closed = 0;
  }
  ~FakePlugin() override {
    ::close(the_channel.fd);
    ::close(write_end_);
  }

  std::string refusal(const std::function<void(distro_transport&)>& spoil) {
    distro_transport table = sound_table();
    spoil(table);
    try {
      const Plugin plugin(&table, "/a/path.so");
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "";
  }

  std::unique_ptr<Channel> open(const std::function<void(distro_transport&)>& spoil) {
    table_ = sound_table();
    spoil(table_);
    ChannelConfig config = test::config(Carrier::inproc, 1, 3);
    config.carrier = Carrier::plugin;
    config.plugin = std::make_shared<const Plugin>(&table_, "/a/path.so");
    return open_channel(config);
  }

  // What a receive of a connected channel throws when the library does this.
  std::string failure(const std::function<void(distro_transport&)>& spoil) {
    const auto channel = open(spoil);
    PeerAddress other = channel->address();
    other.host = "elsewhere";
    channel->connect({other, channel->address(), other});
    try {
      channel->receive(0, in(seconds(5)));
    } catch (const PeerError& error) {
      return error.what();
    }
    return "";
  }

  int write_end_ = -1;
  distro_transport table_{};
};

void expect_names(const std::string& error, const std::string& what) {
  EXPECT_NE(error.find("/a/path.so"), std::string::npos) << what << ": " << error;
  EXPECT_NE(error.find(what), std::string::npos) << what << ": " << error;
}

TEST_F(FakePlugin, ASoundTableIsTaken) {
  EXPECT_EQ(refusal([](auto&) {}), "");
}

TEST_F(FakePlugin, AnOlderTableWithoutOptionalFunctionsIsTaken) {
  distro_transport table = sound_table();
  table.struct_size = offsetof(distro_transport, counters);
  table.counters = [](distro_transport_channel*, distro_transport_counters*) {};
  EXPECT_EQ(Plugin(&table, "/a/path.so").table().counters, nullptr);
}

TEST_F(FakePlugin, ATableThatBreaksTheRulesIsRefusedByName) {
  expect_names(refusal([](auto& t) { t.abi = 2; }), "version 2");
  expect_names(refusal([](auto& t) { t.struct_size = 16; }), "its table has 16 bytes");
  expect_names(refusal([](auto& t) { t.struct_size = std::size_t{1} << 40; }), "its table has");
  expect_names(refusal([](auto& t) { t.name = nullptr; }), "its name is null");
  expect_names(refusal([](auto& t) { t.version = ""; }), "its version is not 1 to 63");
  expect_names(refusal([](auto& t) { t.name = "a\nb"; }), "its name is not");
  const std::string endless(100'000, 'x');
  expect_names(refusal([&](auto& t) { t.name = endless.c_str(); }), "its name is not");
  expect_names(refusal([](auto& t) { t.open = nullptr; }), "'open' is null");
  expect_names(refusal([](auto& t) { t.close = nullptr; }), "'close' is null");
  EXPECT_THROW(Plugin(nullptr, "/a/path.so"), ConfigError);
}

TEST(PluginFile, WhatIsNoTransportIsRefusedWithItsPath) {
  const auto error = [](const std::string& path) -> std::string {
    try {
      Plugin::load(path);
    } catch (const ConfigError& caught) {
      return caught.what();
    }
    return "";
  };
  EXPECT_NE(error("/no/such/lib.so").find("/no/such/lib.so"), std::string::npos);
  EXPECT_NE(error("/proc/self/exe/").find("docs/transports.md"), std::string::npos);
  Dl_info zmq{};
  ASSERT_NE(::dladdr(reinterpret_cast<void*>(&::zmq_version), &zmq), 0);
  const std::string other = error(zmq.dli_fname);
  EXPECT_NE(other.find("does not export distro_transport_plugin"), std::string::npos) << other;
  EXPECT_EQ(Plugin::load(DISTRO_EXAMPLE_TRANSPORT)->identity(), "example 1.0");
}

TEST_F(FakePlugin, AChannelThatCannotOpenIsAConfigErrorAndLeavesNothingOpen) {
  const auto error = [&](const std::function<void(distro_transport&)>& spoil) -> std::string {
    try {
      open(spoil);
    } catch (const ConfigError& caught) {
      return caught.what();
    }
    return "";
  };
  expect_names(error([](auto& t) {
                 t.open = [](const distro_transport_config*, distro_transport_channel**,
                             distro_transport_error* e) -> std::int32_t {
                   std::memset(e->text, 'x', sizeof e->text);  // no zero byte
                   std::memcpy(e->text, "no\ncable", 8);
                   return DISTRO_TRANSPORT_ERROR;
                 };
               }),
               "no?cable");
  expect_names(error([](auto& t) {
                 t.open = [](const distro_transport_config*, distro_transport_channel**,
                             distro_transport_error*) -> std::int32_t {
                   throw std::runtime_error("on fire");
                 };
               }),
               "it threw on fire");
  expect_names(error([](auto& t) {
                 t.open = [](const distro_transport_config*, distro_transport_channel** channel,
                             distro_transport_error*) -> std::int32_t {
                   *channel = nullptr;
                   return DISTRO_TRANSPORT_OK;
                 };
               }),
               "without a channel");
  EXPECT_EQ(closed, 0);
  expect_names(error([](auto& t) {
                 t.address = [](distro_transport_channel*) -> const char* { return nullptr; };
               }),
               "address");
  expect_names(error([](auto& t) {
                 t.poll_fd = [](distro_transport_channel*) -> std::int32_t { return 1'000'000; };
               }),
               "poll_fd");
  EXPECT_EQ(opened, 2);
  EXPECT_EQ(closed, 2);
}

TEST_F(FakePlugin, ABrokenPromiseFailsTheRankWithTheNameOfTheLibrary) {
  const auto event = [&](std::int32_t kind, int peer, const void* data, std::size_t size) {
    next_event = {0, kind, peer, data, size, nullptr};
    return failure([](auto&) {});
  };
  expect_names(event(DISTRO_TRANSPORT_UP, 3, nullptr, 0), "rank 3, which is no peer");
  expect_names(event(DISTRO_TRANSPORT_UP, 1, nullptr, 0), "rank 1, which is no peer");
  expect_names(event(DISTRO_TRANSPORT_UP, -1, nullptr, 0), "rank -1, which is no peer");
  expect_names(event(99, 0, nullptr, 0), "unknown kind 99");
  expect_names(event(DISTRO_TRANSPORT_FRAME, 0, nullptr, 8), "a frame of rank 0 of 8 bytes");
  expect_names(event(DISTRO_TRANSPORT_FRAME, 0, "x", std::size_t{1} << 40), "a frame of rank 0");
  next_event = {};
  expect_names(failure([](auto& t) {
                 t.receive = [](distro_transport_channel*, distro_transport_event*,
                                distro_transport_error*) -> std::int32_t { throw 7; };
               }),
               "it threw something");
  expect_names(failure([](auto& t) {
                 t.receive = [](distro_transport_channel*, distro_transport_event*,
                                distro_transport_error*) -> std::int32_t { return -5; };
               }),
               "it gave no reason");
  EXPECT_EQ(opened, closed);
}

TEST_F(FakePlugin, ARankThatTheTransportKnowsToBeLostIsNamed) {
  next_event = {0, DISTRO_TRANSPORT_LOST, 2, nullptr, 0, "cable cut"};
  const auto error = failure([](auto&) {});
  EXPECT_NE(error.find("rank 2 is lost: cable cut"), std::string::npos) << error;
}

TEST_F(FakePlugin, FramesThatAreNoneAreRejectedAndCounted) {
  static const char junk[] = "certainly no frame of the session protocol";
  next_event = {0, DISTRO_TRANSPORT_FRAME, 2, junk, sizeof junk, nullptr};
  const auto channel = open([](auto&) {});
  channel->connect(std::vector<PeerAddress>(3, channel->address()));
  for (const auto deadline = in(seconds(5));
       channel->counters().rejected_frames < 10 && Clock::now() < deadline;) {
    ::usleep(1000);
  }
  EXPECT_GE(channel->counters().rejected_frames, 10U);
  EXPECT_FALSE(channel->lost());
}

TEST(PluginCounters, AreThoseOfTheLibrary) {
  Group group(Carrier::plugin, 2);
  group[0].send(1, shared_pattern(1000, 1));
  EXPECT_EQ(group[1].receive(0, in(seconds(5))), pattern(1000, 1));
  group.close_all();
  // Whoever leaves first does not read the other's last acknowledgement.
  const auto sent = group[0].counters().socket_bytes_sent;
  const auto received = group[1].counters().socket_bytes_received;
  EXPECT_GE(received, 1000U + kHeaderBytes);
  EXPECT_LE(received, sent);
}

}  // namespace
}  // namespace distro::transport::test
