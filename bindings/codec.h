#pragma once

#include <pybind11/pybind11.h>

namespace distro::bindings {

/// `Codec`: the `weights` mode codec of one module without a group, for tests that compare the
/// codecs of host and device.
void bind_codec(pybind11::module_& module);

}  // namespace distro::bindings
