#include "plugins/registry.h"

#include <gtest/gtest.h>

#include <string>

namespace distro::plugins {
namespace {

std::string refusal(std::string_view name) {
  try {
    (void)find_codec(name);
  } catch (const UnknownCodec& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Registry, KnowsItsCodecs) {
  EXPECT_EQ(codecs().front().name, "weights");
  EXPECT_EQ(find_codec("weights").name, "weights");
}

TEST(Registry, SaysWhatIsAllowed) {
  EXPECT_EQ(refusal("ef"), "the codec 'ef' is not available yet; allowed: 'weights'");
  EXPECT_EQ(refusal("demo"), "the codec 'demo' is not available yet; allowed: 'weights'");
  EXPECT_EQ(refusal("Weights"), "no codec is named 'Weights'; allowed: 'weights'");
}

}  // namespace
}  // namespace distro::plugins
