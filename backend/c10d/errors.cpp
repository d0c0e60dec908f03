#include "backend/c10d/errors.h"

#include <fmt/format.h>

#include "backend/exchange/error.h"

namespace distro::c10d_backend {
namespace {

// How long to wait for the channel to say who died, or for all ranks to answer, when the inner
// backend's error names nobody. Shorter than a round trip blames ranks that are well, longer delays
// the error.
constexpr std::chrono::milliseconds kPatience{2000};

// An error from which the group does not recover.
[[noreturn]] void fail(const exchange::Group& group, const std::string& message) {
  group.report_failure(message);
  C10_THROW_ERROR(DistBackendError, message);
}

}  // namespace

void fail_inner(exchange::Group& group, const std::string& operation, const std::string& reason) {
  if (const auto suspect = group.suspect(kPatience)) {
    group.abort(suspect->rank(), suspect->what());
    fail(group,
         fmt::format("rank {}: {} failed because of rank {}: {} (the inner backend says: {})",
                     group.rank(), operation, suspect->rank(), suspect->what(), reason));
  }
  fail(group, fmt::format(
                  "rank {}: {} failed in the inner backend although all ranks answer; one of them "
                  "may not have come to this collective (TORCH_DISTRIBUTED_DEBUG=DETAIL names it), "
                  "or its log tells more: {}",
                  group.rank(), operation, reason));
}

void fail_lost(exchange::Group& group, const std::string& operation,
               const transport::PeerError& lost) {
  group.abort(lost.rank(), lost.what());
  fail(group, fmt::format("rank {}: {} failed because of rank {}: {}", group.rank(), operation,
                          lost.rank(), lost.what()));
}

void translate(exchange::Group& group, const std::string& operation,
               const std::function<void()>& work) {
  try {
    work();
  } catch (const transport::PeerError& error) {
    fail_lost(group, operation, error);
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
