#pragma once

#include <torch/headeronly/version.h>

/// Whether this is compiled for torch 2.`minor` or later. c10d's headers differ between minors;
/// what a later one adds is declared under this, and nowhere else is the version asked.
#define DISTRO_TORCH_AT_LEAST(minor) \
  (TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= (minor)))
