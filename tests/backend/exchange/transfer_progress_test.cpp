#include "backend/exchange/transfer_progress.h"

#include <gtest/gtest.h>

#include <string>

namespace distro::exchange {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

const auto kBegan = transport::Clock::now();

TransferProgress broadcast(std::size_t moved) {
  return {.name = "broadcast 3", .began = kBegan, .total = 350'000'000, .moved = moved};
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t found = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++found;
  }
  return found;
}

TEST(TransferProgress, SaysHowFarHowFastAndHowLong) {
  EXPECT_EQ(broadcast(120'000'000).text(kBegan + seconds(60)),
            "broadcast 3: 34% (120 of 350 MB), 2.0 MB/s, about 115 s left");
  EXPECT_EQ(broadcast(0).text(kBegan + seconds(60)),
            "broadcast 3: 0% (0 of 350 MB), 0.0 MB/s, nothing came yet");
}

TEST(TransferProgress, IsToldRarelyAndItsEndToo) {
  transport::set_log_level(transport::LogLevel::warning);
  ::testing::internal::CaptureStderr();
  TransferReports reports(2);
  std::size_t moved = 0;
  for (int second = 0; second < 100; ++second) {
    const auto progress = broadcast(moved += 1'000'000);
    reports.look(&progress, kBegan + seconds(second));
  }
  reports.look(nullptr, kBegan + seconds(100));
  reports.look(nullptr, kBegan + seconds(101));
  const std::string told = ::testing::internal::GetCapturedStderr();
  // After 10, 40, 70 s; and the end.
  EXPECT_EQ(count(told, "[distro rank 2] broadcast 3: "), 4U) << told;
  EXPECT_EQ(count(told, "3% (11 of 350 MB)"), 1U) << told;
  EXPECT_EQ(count(told, "broadcast 3: done, 350 MB in 100 s"), 1U) << told;
}

TEST(TransferProgress, WhatIsSmallOrSoonOverIsNotTold) {
  transport::set_log_level(transport::LogLevel::info);
  ::testing::internal::CaptureStderr();
  TransferReports reports(2);
  const TransferProgress small{.name = "barrier 1", .began = kBegan, .total = 1000, .moved = 1};
  reports.look(&small, kBegan + seconds(100));
  const auto large = broadcast(1);
  reports.look(&large, kBegan + milliseconds(4900));
  reports.look(nullptr, kBegan + milliseconds(4950));
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
  ::testing::internal::CaptureStderr();
  reports.look(&large, kBegan + milliseconds(5100));
  transport::set_log_level(transport::LogLevel::warning);
  EXPECT_EQ(count(::testing::internal::GetCapturedStderr(), "broadcast 3: 0%"), 1U);
}

}  // namespace
}  // namespace distro::exchange
