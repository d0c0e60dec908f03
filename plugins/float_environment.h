#pragma once

#include <cfenv>

namespace distro::plugins {

/// Round to nearest, subnormals kept, in this thread while it lives: a script may have asked for
/// FTZ and DAZ (torch.set_flush_denormal), on one rank or one thread only, and what ranks compute
/// from records must have the same bits everywhere.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() noexcept {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&before_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t before_{};
};

}  // namespace distro::plugins
