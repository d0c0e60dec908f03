#include "backend/exchange/envelope.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "tests/seed.h"

namespace distro::exchange {
namespace {

std::vector<std::byte> sample(std::size_t body_bytes) {
  std::vector<std::byte> body(body_bytes);
  for (std::size_t i = 0; i < body.size(); ++i) {
    body[i] = static_cast<std::byte>(i * 7);
  }
  return seal({.kind = MessageKind::step,
               .flags = kAsksResync,
               .module = 3,
               .origin = 5,
               .gain = 2.0F,
               .exchange = 77,
               .geometry = 0x1234,
               .checksum = 0xabcd},
              body);
}

TEST(Envelope, OpensToWhatWasSealed) {
  for (const std::size_t size : {0U, 1U, 1000U}) {
    const auto message = sample(size);
    EXPECT_EQ(message.size(), size + kEnvelopeBytes);
    const auto opened = open(message);
    EXPECT_EQ(opened.envelope.kind, MessageKind::step);
    EXPECT_EQ(opened.envelope.flags, kAsksResync);
    EXPECT_EQ(opened.envelope.module, 3U);
    EXPECT_EQ(opened.envelope.origin, 5U);
    EXPECT_EQ(opened.envelope.gain, 2.0F);
    EXPECT_EQ(opened.envelope.exchange, 77U);
    EXPECT_EQ(opened.envelope.geometry, 0x1234U);
    EXPECT_EQ(opened.envelope.checksum, 0xabcdU);
    ASSERT_EQ(opened.body.size(), size);
  }
}

TEST(Envelope, RejectsEveryFlippedByteTruncationAndLengthLie) {
  const auto seed = test::seed();
  std::mt19937_64 random(seed);
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  for (int i = 0; i < 200; ++i) {
    auto message = sample(random() % 500);
    switch (i % 3) {
      case 0:
        message[random() % message.size()] ^= static_cast<std::byte>(1 + random() % 255);
        break;
      case 1:
        message.resize(random() % message.size());
        break;
      default: {
        const auto lie = static_cast<std::uint32_t>(random());
        std::memcpy(message.data() + 44, &lie, sizeof lie);
        break;
      }
    }
    EXPECT_THROW(open(message), EnvelopeError) << "case " << i;
  }
}

TEST(Envelope, RejectsUnknownKindsFlagsAndGainsThatAreSealedWell) {
  EXPECT_THROW(open(seal({.kind = static_cast<MessageKind>(9)}, {})), EnvelopeError);
  EXPECT_THROW(open(seal({.flags = 0x8000}, {})), EnvelopeError);
  EXPECT_THROW(open(seal({.gain = std::numeric_limits<float>::quiet_NaN(), .exchange = 1}, {})),
               EnvelopeError);
  EXPECT_THROW(open(seal({.gain = -1.0F, .exchange = 1}, {})), EnvelopeError);
}

TEST(Envelope, RejectsWhatDoesNotBelongToItsKind) {
  const std::vector<std::byte> eight(8);
  const std::vector<std::byte> five(5);
  EXPECT_NO_THROW(open(seal({.kind = MessageKind::begin}, eight)));
  EXPECT_THROW(open(seal({.kind = MessageKind::begin}, five)), EnvelopeError);
  EXPECT_THROW(open(seal({.kind = MessageKind::begin, .exchange = 1}, eight)), EnvelopeError);
  EXPECT_THROW(open(seal({.kind = MessageKind::average}, five)), EnvelopeError);
  EXPECT_THROW(open(seal({.kind = MessageKind::average, .gain = 1.0F}, {})), EnvelopeError);
  EXPECT_THROW(open(seal({.kind = MessageKind::step}, {})), EnvelopeError);  // exchange 0
  EXPECT_THROW(open(seal({.kind = MessageKind::step, .flags = kNonFinite, .exchange = 1}, five)),
               EnvelopeError);
  EXPECT_THROW(open(seal({.kind = MessageKind::describe, .flags = kAsksResync}, five)),
               EnvelopeError);
  EXPECT_NO_THROW(open(seal(
      {.kind = MessageKind::check, .flags = kAsksResync, .gain = 2.0F, .exchange = 1}, eight)));
  EXPECT_NO_THROW(open(seal({.kind = MessageKind::check, .flags = kExact, .exchange = 1}, five)));
  EXPECT_THROW(open(seal({.kind = MessageKind::check, .exchange = 1}, five)), EnvelopeError);
  EXPECT_THROW(open(seal({.kind = MessageKind::check}, eight)), EnvelopeError);  // exchange 0
  EXPECT_THROW(open(seal({.kind = MessageKind::check, .flags = kNonFinite, .exchange = 1}, eight)),
               EnvelopeError);
}

TEST(Envelope, TextsOfPeersAreBounded) {
  const std::vector<std::byte> reason(8 + kMaxReasonBytes);
  EXPECT_NO_THROW(open(seal({.kind = MessageKind::begin, .flags = kExact}, reason)));
  EXPECT_NO_THROW(open(seal({.kind = MessageKind::step, .flags = kExact, .exchange = 1}, {})));
  EXPECT_THROW(open(seal({.kind = MessageKind::begin, .flags = kExact},
                         std::vector<std::byte>(9 + kMaxReasonBytes))),
               EnvelopeError);
  EXPECT_THROW(open(seal({.kind = MessageKind::step, .flags = kExact, .exchange = 1}, reason)),
               EnvelopeError);
  EXPECT_THROW(open(seal({.kind = MessageKind::average, .flags = kExact}, {})), EnvelopeError);
  EXPECT_THROW(
      open(seal({.kind = MessageKind::step, .flags = kExact | kNonFinite, .exchange = 1}, {})),
      EnvelopeError);
  EXPECT_THROW(
      open(seal({.kind = MessageKind::describe}, std::vector<std::byte>(kMaxDescriptionBytes + 1))),
      EnvelopeError);
}

}  // namespace
}  // namespace distro::exchange
