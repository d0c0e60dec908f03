#include "transport/host.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "transport/channel.h"

namespace distro::transport {
namespace {

TEST(Host, IdentityIsStable) {
  EXPECT_EQ(host_identity(), host_identity());
  EXPECT_GT(host_identity().size(), 10U);
}

TEST(Host, ThisProcessIsAlive) {
  const ProcessId self = this_process();
  EXPECT_EQ(self.pid, ::getpid());
  EXPECT_TRUE(is_alive(self));
}

TEST(Host, AReusedPidIsAnotherProcess) {
  ProcessId self = this_process();
  self.start += 1;
  EXPECT_FALSE(is_alive(self));
}

TEST(Host, ZombiesAndGoneProcessesAreDead) {
  int pipe_ends[2];
  ASSERT_EQ(::pipe(pipe_ends), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const std::uint64_t start = this_process().start;
    (void)!::write(pipe_ends[1], &start, sizeof start);
    ::pause();
    ::_exit(0);
  }
  ProcessId process{child, 0};
  ASSERT_EQ(::read(pipe_ends[0], &process.start, sizeof process.start), sizeof process.start);
  EXPECT_TRUE(is_alive(process));
  ::kill(child, SIGKILL);
  siginfo_t info{};
  ASSERT_EQ(::waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT), 0);
  EXPECT_FALSE(is_alive(process)) << "a zombie";
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  EXPECT_FALSE(is_alive(process)) << "gone";
  ::close(pipe_ends[0]);
  ::close(pipe_ends[1]);
}

}  // namespace
}  // namespace distro::transport
