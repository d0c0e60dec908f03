#include "backend/exchange/text.h"

#include <gtest/gtest.h>

#include "backend/exchange/module_spec.h"

namespace distro::exchange {
namespace {

TEST(Text, PrintableCutsEscapesAndReplaces) {
  EXPECT_EQ(printable("weight", 10), "weight");
  EXPECT_EQ(printable("weight", 3), "wei...");
  EXPECT_EQ(printable("a\nb", 10), "a\\nb");
  EXPECT_EQ(printable("\xff", 10), "\xef\xbf\xbd");
  EXPECT_TRUE(is_utf8(printable("\xc3\xa4\xc3\xa4", 3)));  // cut within a character
  EXPECT_TRUE(is_utf8("\xc3\xa4"));
  EXPECT_FALSE(is_utf8("\xc3"));
}

TEST(Text, ADescriptionEndsAtAWholeLine) {
  const std::vector<TensorSpec> tensors(5, {"w", kernels::DType::f32, {3}});
  const std::string line = "w float32 [3]\n";
  EXPECT_EQ(describe(tensors, 1000), line + line + line + line + line);
  EXPECT_EQ(describe(tensors, line.size() * 2 + 5), line + line);
}

TEST(Text, ADifferenceIsShortHoweverManyRanksAndHoweverLongTheirNames) {
  std::map<int, std::string> descriptions = {{0, "w\n"}};
  for (int rank = 1; rank < 300; ++rank) {
    descriptions[rank] = std::to_string(rank) + std::string(10'000, 'w') + "\n";
  }
  const std::string text = first_difference(descriptions);
  EXPECT_LT(text.size(), 2000U);
  EXPECT_NE(text.find("where rank 0 has w, rank 100 has 100www"), std::string::npos) << text;
  EXPECT_NE(text.find("295 more differ"), std::string::npos) << text;
  EXPECT_EQ(first_difference({{0, "a\n"}, {1, "b\n"}, {2, "b\n"}}),
            "where rank 0 has a, ranks 1, 2 have b");
}

TEST(Text, ADifferenceIsSaidOfTheRanksThatAreKnown) {
  EXPECT_EQ(first_difference({{1, "a\n"}, {4, "a\nb\n"}}),
            "where rank 1 has nothing, rank 4 has b");
  EXPECT_EQ(first_difference({{3, "a\n"}}), "");
}

}  // namespace
}  // namespace distro::exchange
