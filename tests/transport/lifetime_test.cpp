#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>

#include "tests/transport/group.h"
#include "transport/channel.h"

namespace distro::transport::test {
namespace {

using std::chrono::seconds;

std::ptrdiff_t entries(const char* directory) {
  return std::distance(std::filesystem::directory_iterator(directory), {});
}

class Lifetime : public testing::TestWithParam<Carrier> {};

TEST_P(Lifetime, FiftyGroupsLeaveNoThreadAndNoDescriptor) {
  const auto cycle = [](bool goodbye) {
    Group group(GetParam(), 2);
    group[0].send(1, shared_pattern(10, 1));
    group[1].receive(0, in(seconds(5)));
    if (goodbye) {
      group.close_all();
    }
  };
  cycle(true);
  const auto threads = entries("/proc/self/task");
  const auto descriptors = entries("/proc/self/fd");
  for (int i = 0; i < 50; ++i) {
    cycle(i % 10 != 0);
  }
  EXPECT_EQ(entries("/proc/self/fd"), descriptors);
  // A joined thread's entry may outlive it by a moment.
  for (const auto deadline = in(seconds(2));
       entries("/proc/self/task") > threads && Clock::now() < deadline;) {
    ::usleep(1000);
  }
  EXPECT_EQ(entries("/proc/self/task"), threads);
}

INSTANTIATE_TEST_SUITE_P(Carriers, Lifetime,
                         testing::Values(Carrier::tcp, Carrier::ipc, Carrier::inproc,
                                         Carrier::plugin),
                         [](const auto& param_info) { return name(param_info.param); });

// A data-loading worker inherits the channel: it must neither use nor end it.
TEST(Lifetime, AForkedChildLeavesTheChannelAlone) {
  Group group(Carrier::ipc, 2);
  group[0].send(1, shared_pattern(10, 1));
  EXPECT_EQ(group[1].receive(0, in(seconds(5))), pattern(10, 1));
  const pid_t child = ::fork();
  if (child == 0) {
    int failures = 0;
    try {
      group[0].send(1, shared_pattern(10, 2));
      ++failures;
    } catch (const ClosedError&) {
    }
    group[0].close(in(seconds(5)));
    group.channels.clear();
    ::_exit(failures);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  group[0].send(1, shared_pattern(10, 3));
  EXPECT_EQ(group[1].receive(0, in(seconds(5))), pattern(10, 3));
  group.close_all();
  EXPECT_EQ(group[1].counters().rejected_frames, 0U);
}

TEST(Lifetime, SeveralGroupsShareOneThread) {
  Group first(Carrier::tcp, 2);
  const auto threads = entries("/proc/self/task");
  {
    Group second(Carrier::inproc, 3);
    EXPECT_EQ(entries("/proc/self/task"), threads);
    second.close_all();
  }
  first[0].send(1, shared_pattern(10, 1));
  EXPECT_EQ(first[1].receive(0, in(seconds(5))), pattern(10, 1));
  first.close_all();
}

}  // namespace
}  // namespace distro::transport::test
