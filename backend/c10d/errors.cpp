#include "backend/c10d/errors.h"

#include <fmt/format.h>

#include "backend/exchange/error.h"

namespace distro::c10d_backend {
namespace {

// How long to wait for the channel to say who died when the inner backend's error names nobody.
// Shorter blames nobody, longer delays the error.
constexpr std::chrono::milliseconds kPatience{1000};

// An error from which the group does not recover.
[[noreturn]] void fail(const exchange::Group& group, const std::string& message) {
  group.report_failure(message);
  C10_THROW_ERROR(DistBackendError, message);
}

// The inner backend's errors come as std::runtime_error with addresses instead of ranks.
[[noreturn]] void fail_inner(exchange::Group& group, const std::string& operation,
                             const char* what) {
  if (const auto lost = group.lost(kPatience)) {
    group.abort(lost->rank(), lost->what());
    fail(group,
         fmt::format("rank {}: {} failed because of rank {}: {} (the inner backend says: {})",
                     group.rank(), operation, lost->rank(), lost->what(), what));
  }
  fail(group,
       fmt::format("rank {}: {} failed in the inner backend, and no rank is known to be dead; look "
                   "at the logs of the other ranks: {}",
                   group.rank(), operation, what));
}

}  // namespace

void translate(exchange::Group& group, const std::string& operation,
               const std::function<void()>& work) {
  try {
    work();
  } catch (const transport::PeerError& error) {
    group.abort(error.rank(), error.what());
    fail(group,
         fmt::format("{} failed because of rank {}: {}", operation, error.rank(), error.what()));
  } catch (const transport::TransportError& error) {
    fail(group, fmt::format("{}: {}", operation, error.what()));
  } catch (const exchange::ExchangeError& error) {
    fail(group, fmt::format("{}: {}", operation, error.what()));
  } catch (const c10::DistError&) {
    throw;
  } catch (const c10::Error&) {
    throw;  // a check of the caller's tensors
  } catch (const std::logic_error&) {
    throw;
  } catch (const std::exception& error) {
    fail_inner(group, operation, error.what());
  }
}

std::exception_ptr translated(exchange::Group& group, const std::string& operation,
                              std::exception_ptr error) {
  try {
    translate(group, operation, [&] { std::rethrow_exception(error); });
  } catch (...) {
    return std::current_exception();
  }
  return error;
}

}  // namespace distro::c10d_backend
