#pragma once

#include <memory>
#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace distro::c10d_backend {

/// The backend of what stays exact, shared by the process group and its modules' synchronisers.
using InnerBackend = std::shared_ptr<c10d::Backend>;

/// Take shared ownership. Whoever lets go of the last reference, the backend is destroyed without
/// Python's lock: Gloo's destructor joins a thread which may be waiting for that lock to free a
/// tensor.
InnerBackend share(c10::intrusive_ptr<c10d::Backend> backend);

}  // namespace distro::c10d_backend
