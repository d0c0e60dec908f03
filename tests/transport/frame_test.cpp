#include "transport/frame.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace distro::transport {
namespace {

std::vector<std::byte> encoded(const FrameHeader& header, std::size_t payload_bytes) {
  const std::vector<std::byte> payload(payload_bytes, std::byte{7});
  std::vector<std::byte> bytes(kHeaderBytes + payload_bytes);
  encode_frame({header, payload}, bytes);
  return bytes;
}

FrameHeader data_header() {
  return {FrameKind::data, kFlagFirst | kFlagLast, 0x1122'3344'5566'7788ULL, 5, 9};
}

TEST(Frame, ComesBackAsItWas) {
  const auto bytes = encoded(data_header(), 100);
  const auto parsed = parse_frame(bytes, 100);
  ASSERT_TRUE(parsed.frame) << parsed.error;
  EXPECT_EQ(parsed.frame->header.kind, FrameKind::data);
  EXPECT_EQ(parsed.frame->header.flags, kFlagFirst | kFlagLast);
  EXPECT_EQ(parsed.frame->header.session, 0x1122'3344'5566'7788ULL);
  EXPECT_EQ(parsed.frame->header.sequence, 5U);
  EXPECT_EQ(parsed.frame->header.ack, 9U);
  EXPECT_EQ(parsed.frame->payload.size(), 100U);
}

// The layout of docs/protocol.md, byte by byte.
TEST(Frame, HasTheDocumentedBytes) {
  const auto bytes = encoded(data_header(), 3);
  const std::vector<int> expected = {0xD7, 2,    3,    3,                             //
                                     3,    0,    0,    0,                             //
                                     0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,  //
                                     5,    0,    0,    0,    0,    0,    0,    0,     //
                                     9,    0,    0,    0,    0,    0,    0,    0};
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(std::to_integer<int>(bytes[i]), expected[i]) << "byte " << i;
  }
  EXPECT_EQ(bytes.size(), kHeaderBytes + 3);
}

TEST(Frame, EverySingleBitFlipIsRejected) {
  auto bytes = encoded(data_header(), 20);
  for (std::size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    const auto mask = static_cast<std::byte>(1U << (bit % 8));
    bytes[bit / 8] ^= mask;
    EXPECT_FALSE(parse_frame(bytes, 1000).frame) << "bit " << bit;
    bytes[bit / 8] ^= mask;
  }
  EXPECT_TRUE(parse_frame(bytes, 1000).frame);
}

TEST(Frame, EveryTruncationAndExtensionIsRejected) {
  auto bytes = encoded(data_header(), 20);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(parse_frame(std::span(bytes).first(size), 1000).frame) << size;
  }
  bytes.push_back(std::byte{0});
  EXPECT_FALSE(parse_frame(bytes, 1000).frame);
}

TEST(Frame, ShapesThatNoKindHasAreRejected) {
  const auto error = [](FrameKind kind, std::uint8_t flags, std::uint64_t sequence,
                        std::size_t payload) {
    return std::string(parse_frame(encoded({kind, flags, 1, sequence, 0}, payload), 4096).error);
  };
  EXPECT_NE(error(static_cast<FrameKind>(0), 0, 0, 0), "");
  EXPECT_NE(error(static_cast<FrameKind>(7), 0, 0, 0), "");
  EXPECT_NE(error(FrameKind::data, 8, 0, 1), "");
  EXPECT_NE(error(FrameKind::ack, kFlagFirst, 0, 0), "");
  EXPECT_NE(error(FrameKind::ack, 0, 1, 0), "");
  EXPECT_NE(error(FrameKind::ack, 0, 0, 1), "");
  EXPECT_NE(error(FrameKind::goodbye, 0, 0, 1), "");
  EXPECT_NE(error(FrameKind::hello, 0, 0, kGreetingBytes - 1), "");
  EXPECT_NE(error(FrameKind::welcome, 0, 0, kGreetingBytes + 1), "");
  EXPECT_NE(error(FrameKind::abort, 0, 0, 3), "");
  EXPECT_NE(error(FrameKind::abort, 0, 0, 5 + kMaxReasonBytes), "");
  EXPECT_NE(error(FrameKind::data, 0, 0, 4097), "");
  EXPECT_EQ(error(FrameKind::ack, kFlagHold, 0, 0), "");
  EXPECT_EQ(error(FrameKind::goodbye, 0, 12, 0), "");
  EXPECT_EQ(error(FrameKind::hello, 0, 0, kGreetingBytes), "");
}

TEST(Frame, GreetingComesBackAsItWas) {
  const Greeting greeting{1, 2, 3, 4, 5, 6, 7};
  std::array<std::byte, kGreetingBytes> bytes{};
  encode_greeting(greeting, bytes);
  const Greeting back = parse_greeting(bytes);
  EXPECT_EQ(back.min_version, 1);
  EXPECT_EQ(back.max_version, 2);
  EXPECT_EQ(back.rank, 3U);
  EXPECT_EQ(back.world_size, 4U);
  EXPECT_EQ(back.chunk_bytes, 5U);
  EXPECT_EQ(back.group, 6U);
  EXPECT_EQ(back.addressee, 7U);
}

TEST(Frame, AbortReasonIsCutAndCannotForgeLogLines) {
  const std::string payload = encode_abort(3, "bad\nnews" + std::string(2 * kMaxReasonBytes, 'x'));
  EXPECT_EQ(payload.size(), 4 + kMaxReasonBytes);
  const AbortNote note = parse_abort(std::as_bytes(std::span(payload)));
  EXPECT_EQ(note.culprit, 3U);
  EXPECT_EQ(note.reason.substr(0, 8), "bad?news");
}

}  // namespace
}  // namespace distro::transport
