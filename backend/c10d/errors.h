#pragma once

#include <torch/csrc/distributed/c10d/exception.h>

#include <functional>
#include <memory>
#include <string>

#include "backend/exchange/group.h"

namespace distro::c10d_backend {

/// Run `work`, a step of `operation`, and turn what it throws into torch's types: every failure of
/// the exchange or of the inner backend becomes c10::DistBackendError that names the rank to blame
/// where one is known (bad tensors from the caller stay what they are). Before it throws, the other
/// ranks are told.
void translate(exchange::Group& group, const std::string& operation,
               const std::function<void()>& work);

/// The same for an error that was caught elsewhere.
std::exception_ptr translated(exchange::Group& group, const std::string& operation,
                              std::exception_ptr error);

/// Throw c10::DistBackendError for a failure of the inner backend, whose errors tell addresses
/// instead of ranks. Finds out who is to blame, for which it may wait some seconds.
[[noreturn]] void fail_inner(exchange::Group& group, const std::string& operation,
                             const std::string& reason);

/// Throw c10::DistBackendError: a rank of the group is lost, so `operation` would wait in vain.
/// The other ranks are told before.
[[noreturn]] void fail_lost(exchange::Group& group, const std::string& operation,
                            const transport::PeerError& lost);

}  // namespace distro::c10d_backend
