#include "backend/exchange/transfer_message.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "tests/seed.h"

namespace distro::exchange {
namespace {

transport::Bytes bytes(std::size_t size) { return transport::Bytes(size, std::byte{7}); }

const TransferDescription kSum{.total = 40,
                               .operation = TransferOperation::all_reduce,
                               .type = ElementType::f32,
                               .combiner = Combiner::sum,
                               .root = 3,
                               .elements = 10};

TEST(TransferMessage, OpensToWhatWasWritten) {
  const TransferHeader header{.kind = TransferKind::collective, .stream = 2, .number = 1ULL << 40};
  const auto payload = bytes(17);
  const auto message = write_transfer(header, &kSum, payload);
  ASSERT_EQ(message.size(), kTransferHeaderBytes + kTransferDescriptionBytes + 17);
  const auto opened = open_transfer(message);
  EXPECT_EQ(opened.header.kind, TransferKind::collective);
  EXPECT_EQ(opened.header.stream, 2U);
  EXPECT_EQ(opened.header.number, 1ULL << 40);
  EXPECT_EQ(opened.header.offset, 0U);
  ASSERT_TRUE(opened.description);
  EXPECT_TRUE(same(*opened.description, kSum));
  EXPECT_EQ(opened.description->total, 40U);
  EXPECT_EQ(transport::Bytes(opened.payload.begin(), opened.payload.end()), payload);
  EXPECT_EQ(text_of(*opened.description), "all_reduce of 10 float32 (SUM)");
}

TEST(TransferMessage, ReadsTheBytesThatTheProtocolDescribes) {
  const auto message = write_transfer({.kind = TransferKind::message,
                                       .pooled = true,
                                       .stream = 1,
                                       .number = 0x0102,
                                       .offset = 0x0304},
                                      nullptr, bytes(2));
  const std::vector<std::uint8_t> expected = {0x44, 0x58, 0x58, 0x58, 1, 2, 2, 0, 1, 0, 0, 0,
                                              2,    0,    0,    0,    2, 1, 0, 0, 0, 0, 0, 0,
                                              4,    3,    0,    0,    0, 0, 0, 0, 7, 7};
  ASSERT_EQ(message.size(), expected.size());
  EXPECT_EQ(std::memcmp(message.data(), expected.data(), expected.size()), 0);
}

void refuse(transport::Bytes message, std::size_t at, std::uint8_t value) {
  message.at(at) = std::byte{value};
  EXPECT_THROW(static_cast<void>(open_transfer(message)), EnvelopeError) << "byte " << at;
}

TEST(TransferMessage, RefusesWhatDoesNotFollowTheGrammar) {
  const auto first = write_transfer({.kind = TransferKind::collective}, &kSum, bytes(40));
  static_cast<void>(open_transfer(first));
  for (std::size_t at = 0; at < 5; ++at) {
    refuse(first, at, 0xee);  // magic, version
  }
  refuse(first, 5, 0);                          // kind
  refuse(first, 5, 7);                          // kind
  refuse(first, 5, 2);                          // a message's operation is "send"
  refuse(first, 5, 3);                          // credits have no description
  refuse(first, 6, 3);                          // no pool in a collective
  refuse(first, 6, 4);                          // unknown flag
  refuse(first, 7, 1);                          // reserved
  refuse(first, 8, kMaxStreams);                // stream
  refuse(first, 12, 39);                        // size
  refuse(first, 24, 1);                         // first and not at 0
  refuse(first, kTransferHeaderBytes, 39);      // more than in all
  refuse(first, kTransferHeaderBytes + 8, 0);   // operation
  refuse(first, kTransferHeaderBytes + 8, 12);  // operation
  refuse(first, kTransferHeaderBytes + 9, 16);  // type
  refuse(first, kTransferHeaderBytes + 10, 8);  // operator
  refuse(first, kTransferHeaderBytes + 11, 1);  // reserved
  for (std::size_t size = 0; size < first.size(); ++size) {
    EXPECT_THROW(static_cast<void>(open_transfer(std::span(first).first(size))), EnvelopeError);
  }
  EXPECT_THROW(static_cast<void>(
                   open_transfer(write_transfer({.kind = TransferKind::collective}, nullptr, {}))),
               EnvelopeError);  // a part of nothing
  EXPECT_THROW(static_cast<void>(open_transfer(write_transfer({.kind = TransferKind::collective},
                                                              nullptr, bytes(kTransferChunk + 1)))),
               EnvelopeError);
  EXPECT_THROW(static_cast<void>(open_transfer(
                   write_transfer({.kind = TransferKind::stream_credit}, nullptr, bytes(1)))),
               EnvelopeError);
  EXPECT_THROW(static_cast<void>(open_transfer(write_transfer({.kind = TransferKind::fault},
                                                              nullptr, bytes(kMaxFaultBytes + 1)))),
               EnvelopeError);
}

TEST(TransferMessage, RandomChangesAreRefusedOrKeepTheirMeaning) {
  const auto seed = test::seed();
  SCOPED_TRACE(testing::Message() << "TEST_SEED=" << seed);
  std::mt19937 random(seed);
  const auto message = write_transfer({.kind = TransferKind::collective}, &kSum, bytes(40));
  for (int i = 0; i < 20'000; ++i) {
    auto changed = message;
    for (auto n = 1 + random() % 3; n > 0; --n) {
      changed[random() % changed.size()] = static_cast<std::byte>(random());
    }
    changed.resize(random() % 4 == 0 ? random() % (changed.size() + 1) : changed.size());
    try {
      const auto opened = open_transfer(changed);
      EXPECT_EQ(write_transfer(opened.header, opened.description ? &*opened.description : nullptr,
                               opened.payload),
                changed);
    } catch (const EnvelopeError&) {
      continue;
    }
  }
}

}  // namespace
}  // namespace distro::exchange
