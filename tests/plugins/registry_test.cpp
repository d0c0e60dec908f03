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
  EXPECT_EQ(find_codec("ef").name, "ef");
  EXPECT_EQ(find_codec("demo").name, "demo");
}

TEST(Registry, SaysWhatIsAllowed) {
  EXPECT_EQ(refusal("Weights"), "no codec is named 'Weights'; allowed: 'weights', 'ef', 'demo'");
}

}  // namespace
}  // namespace distro::plugins
