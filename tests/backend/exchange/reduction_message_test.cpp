#include "backend/exchange/reduction_message.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

namespace distro::exchange {
namespace {

std::vector<std::byte> body(std::initializer_list<std::uint32_t> words) {
  std::vector<std::byte> bytes(words.size() * sizeof(std::uint32_t));
  std::memcpy(bytes.data(), std::data(words), bytes.size());
  return bytes;
}

// What a peer that does not follow the protocol can seal; flags and body are as given.
ReductionMessage read(std::uint16_t flags, const std::vector<std::byte>& bytes) {
  const auto message =
      seal({.kind = MessageKind::reduction, .flags = flags, .module = kReductions, .exchange = 1},
           bytes);
  return read_reduction(open(message), 4);
}

TEST(ReductionMessage, OpensToWhatWasSealed) {
  const auto record = body({1, 2, 3});
  const auto bytes = seal_reduction(
      {.decoded = 5, .checksum = 0xabcd, .slot = 7, .non_finite = {0, 3}, .record = record}, 2,
      kReductions, 6, 0x1234);
  const auto opened = open(bytes);
  EXPECT_EQ(opened.envelope.module, kReductions);
  EXPECT_EQ(opened.envelope.origin, 2U);
  EXPECT_EQ(opened.envelope.exchange, 6U);
  EXPECT_EQ(opened.envelope.geometry, 0x1234U);
  const auto message = read_reduction(opened, 4);
  EXPECT_FALSE(message.exact);
  EXPECT_EQ(message.decoded, 5U);
  EXPECT_EQ(message.checksum, 0xabcdU);
  EXPECT_EQ(message.slot, 7U);
  EXPECT_EQ(message.non_finite, (std::vector<std::uint32_t>{0, 3}));
  EXPECT_TRUE(std::ranges::equal(message.record, record));
}

TEST(ReductionMessage, OfAnExactReductionHasNoRecord) {
  const auto bytes = seal_reduction({.exact = true}, 0, kReductions, 1, 0);
  EXPECT_EQ(bytes.size(), kEnvelopeBytes + kReductionHeaderBytes);
  EXPECT_TRUE(read_reduction(open(bytes), 4).exact);
  EXPECT_THROW(read(kExact, body({0, 0, 0, 1})), EnvelopeError);
}

TEST(ReductionMessage, RejectsWhatIsNotWritten) {
  EXPECT_NO_THROW(read(0, body({0, 0, 0})));
  EXPECT_NO_THROW(read(kNonFinite, body({0, 0, 0, 2, 1, 3})));
  EXPECT_THROW(read(0, body({0, 0})), EnvelopeError);                       // too short
  EXPECT_THROW(read(kNonFinite, body({0, 0, 0, 0, 1})), EnvelopeError);     // an empty list
  EXPECT_THROW(read(kNonFinite, body({0, 0, 0, 1})), EnvelopeError);        // a list cut short
  EXPECT_THROW(read(kNonFinite, body({0, 0, 0, 2, 1})), EnvelopeError);     // another
  EXPECT_THROW(read(kNonFinite, body({0, 0, 0, 2, 1, 1})), EnvelopeError);  // twice the same
  EXPECT_THROW(read(kNonFinite, body({0, 0, 0, 2, 3, 1})), EnvelopeError);  // descending
  EXPECT_THROW(read(kNonFinite, body({0, 0, 0, 1, 4})), EnvelopeError);     // no such tensor
  EXPECT_THROW(read(kNonFinite, body({0, 0, 0, 0xffffffff, 1})), EnvelopeError);
  EXPECT_THROW(read(kNonFinite | kExact, body({0, 0, 0})), EnvelopeError);
  EXPECT_THROW(read(kAsksResync, body({0, 0, 0})), EnvelopeError);
}

}  // namespace
}  // namespace distro::exchange
