#include "backend/c10d/exact_work.h"

#include <fmt/format.h>

#include <torch/csrc/distributed/c10d/exception.h>
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <utility>

#include "backend/c10d/errors.h"
#include "backend/c10d/interpreter_end.h"
#include "backend/c10d/python_lock.h"
#include "backend/c10d/tensors.h"
#include "backend/c10d/transfer_work.h"

namespace distro::c10d_backend {
namespace {

using std::chrono::milliseconds;

// How often a wait looks whether a rank was lost in the meantime. Longer: the news is late;
// shorter: the thread wakes for nothing.
constexpr milliseconds kLookAgain{200};

// How long a collective may go on after a rank was lost, for the inner backend to notice by itself.
// Shorter: a collective that was about to end is given up; longer: so is the error.
constexpr milliseconds kGrace{1000};

transport::Deadline until(milliseconds timeout) {
  return timeout == kNoTimeout ? transport::Deadline::max() : transport::Clock::now() + timeout;
}

}  // namespace

c10::intrusive_ptr<c10::ivalue::Future> future_of(c10d::Work& work, c10d::OpType operation) {
  // Of the inner backends' messages only our own transport's complete by themselves.
  if (c10d::isP2POp(operation) && dynamic_cast<const TransferWork*>(&work) == nullptr) {
    return nullptr;
  }
  try {
    return work.getFuture();
  } catch (const c10::Error&) {
    return nullptr;
  }
}

namespace {

bool all_on_host(const std::vector<at::Tensor>& tensors) {
  return std::ranges::all_of(tensors, [](const auto& tensor) { return tensor.is_cpu(); });
}

c10::intrusive_ptr<c10d::Work> started(exchange::Group& group, const std::string& operation,
                                       const ExactWork::Start& start) {
  if (const auto lost = group.lost()) {
    fail_lost(group, operation, *lost);  // what it would do without that rank is undefined
  }
  c10::intrusive_ptr<c10d::Work> inner;
  translate(group, operation, [&] { inner = start(); });
  return inner;
}

}  // namespace

class ExactWork::Completion {
 public:
  Completion(std::shared_ptr<Operations> operations, const Operations::Ticket& ticket,
             std::function<void()> end_of_profile)
      : operations_(std::move(operations)),
        ticket_(ticket),
        end_of_profile_(std::move(end_of_profile)) {}

  // Success is visible here before the hooks run (who asks after them must see it), and the future
  // completes after: who has waited finds the operation retired.
  void succeed() {
    succeeded_ = true;
    if (!ended_.exchange(true)) {
      end_profile();
      operations_->finish(ticket_);
    }
  }

  void fail() {
    if (!ended_.exchange(true)) {
      end_profile();
    }
  }

  // The future is complete.
  void announce() {
    const std::lock_guard lock(mutex_);
    announced_ = true;
    changed_.notify_all();
  }

  // Wait for that; false if it has not come by then.
  bool wait(transport::Deadline deadline) {
    std::unique_lock lock(mutex_);
    return changed_.wait_until(lock, deadline, [this] { return announced_; });
  }

  [[nodiscard]] bool succeeded() const { return succeeded_; }

 private:
  void end_profile() const {
    if (end_of_profile_) {
      end_of_profile_();
    }
  }

  const std::shared_ptr<Operations> operations_;
  const Operations::Ticket ticket_;
  const std::function<void()> end_of_profile_;
  std::atomic<bool> succeeded_{false};
  std::atomic<bool> ended_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  bool announced_ = false;  // guarded by mutex_
};

ExactWork::ExactWork(const Call& call, std::shared_ptr<exchange::Group> group,
                     std::shared_ptr<Operations> operations, const Start& start,
                     std::function<void()> last_act)
    // The profiler shows a receive with the shapes that it receives, as gloo's does.
    : Work(group->rank(), call.type, call.title,
           c10d::isP2POp(call.type) && call.inputs.empty() ? call.outputs : call.inputs),
      group_(std::move(group)),
      operation_(c10d::opTypeToString(call.type)),
      outputs_(call.outputs),
      on_host_(all_on_host(call.inputs) && all_on_host(call.outputs)),
      ticket_(call.ticket),
      concluded_(last_act != nullptr),
      inner_(started(*group_, operation_, start)),
      completion_(std::make_shared<Completion>(std::move(operations), ticket_,
                                               recordFunctionEndCallback_)) {
  const auto inner_future = future_of(*inner_, call.type);
  if (!inner_future) {
    future_ = c10::make_intrusive<c10::ivalue::Future>(
        c10::ListType::create(c10::TensorType::get()), devices_of(outputs_));
    completed_by_wait_ = true;
    last_act_ = std::move(last_act);
    return;
  }
  future_ = c10::make_intrusive<c10::ivalue::Future>(inner_future->elementType(),
                                                     inner_future->devices());
  // Runs in the inner backend's thread (or here, if it is done already).
  inner_future->addCallback([future = future_, group = group_, completion = completion_,
                             operation_name = operation_, outputs = outputs_,
                             act = std::move(last_act)](c10::ivalue::Future& done) {
    try {
      if (done.hasError()) {
        std::rethrow_exception(translated(*group, operation_name, done.exception_ptr()));
      }
      if (act) {
        act();
      }
      completion->succeed();
      future->markCompleted(act ? c10::IValue(outputs) : done.value());
    } catch (...) {
      completion->fail();
      future->setError(std::current_exception());
    }
    completion->announce();
  });
}

bool ExactWork::isCompleted() {
  if (!completed_by_wait_) {
    return completion_->succeeded() || future_->completed();
  }
  return inner_->isCompleted();
}

bool ExactWork::isSuccess() const {
  if (completed_by_wait_ && !future_->completed()) {
    return inner_->isSuccess();
  }
  return completion_->succeeded();
}

std::exception_ptr ExactWork::exception() const {
  if (completed_by_wait_ && !future_->completed()) {
    return inner_->exception();
  }
  return future_->hasError() ? future_->exception_ptr() : nullptr;
}

int ExactWork::sourceRank() const { return inner_->sourceRank(); }

std::vector<at::Tensor> ExactWork::result() { return concluded_ ? outputs_ : inner_->result(); }

void ExactWork::synchronize() {
  const WithoutPythonLock without_lock;
  wait();
}

bool ExactWork::wait(milliseconds timeout) {
  struct AtEnd {
    ~AtEnd() { stay_if_interpreter_ends(); }
  };
  const AtEnd at_end;
  return completed_by_wait_ ? wait_by_inner(timeout) : wait_by_future(timeout);
}

void ExactWork::throw_not_done(std::chrono::milliseconds timeout) const {
  C10_THROW_ERROR(DistBackendError,
                  fmt::format("rank {}: {} is not done after the {} ms that wait() was given; it "
                              "goes on and may be waited for again",
                              group_->rank(), operation_, timeout.count()));
}

// The inner backend waits for a lost rank until its time-out, unless a connection breaks.
void ExactWork::check_lost(Deadline& give_up_at) const {
  const auto lost = group_->lost();
  if (!lost) {
    return;
  }
  const auto now = transport::Clock::now();
  if (give_up_at == Deadline::max()) {
    give_up_at = now + kGrace;
  } else if (now >= give_up_at) {
    fail_lost(*group_, operation_, *lost);
  }
}

bool ExactWork::wait_by_future(milliseconds timeout) {
  const Deadline deadline = until(timeout);
  Deadline give_up_at = Deadline::max();
  while (!completion_->wait(std::min(deadline, transport::Clock::now() + kLookAgain))) {
    if (transport::Clock::now() >= deadline) {
      throw_not_done(timeout);
    }
    check_lost(give_up_at);
  }
  bool done = true;
  try {
    done = inner_->wait(kNoTimeout);
  } catch (...) {
    // The future has it, translated.
  }
  future_->waitAndThrow();
  return done;
}

// Of send and receive a wait that times out breaks the inner backend's connections, so they wait in
// one piece; of Gloo's own time-out for them set_timeout() changes nothing, and on a device a
// time-out would block the caller. Others may be waited for in slices. They don't tell a slice that
// has passed from a failure, nor (gloo's reduce-scatter) whether they are complete; but what has
// failed says so at once.
void ExactWork::wait_for_inner(milliseconds timeout) {
  if (c10d::isP2POp(retrieveOpType())) {
    inner_->wait(timeout == kNoTimeout && on_host_ ? group_->timeout() : timeout);
    return;
  }
  const Deadline deadline = until(timeout);
  Deadline give_up_at = Deadline::max();
  for (;;) {
    const auto began = transport::Clock::now();
    try {
      inner_->wait(kLookAgain);
      return;
    } catch (...) {
      if (transport::Clock::now() - began < kLookAgain) {
        throw;
      }
    }
    if (transport::Clock::now() >= deadline) {
      throw_not_done(timeout);
    }
    check_lost(give_up_at);
  }
}

bool ExactWork::wait_by_inner(std::chrono::milliseconds timeout) {
  const std::lock_guard lock(wait_mutex_);
  if (future_->completed()) {
    future_->waitAndThrow();
    return true;
  }
  try {
    translate(*group_, operation_, [&] { wait_for_inner(timeout); });
    if (last_act_) {
      last_act_();
    }
  } catch (...) {
    if (timeout != kNoTimeout && !inner_->isCompleted() && !group_->lost()) {
      throw_not_done(timeout);
    }
    completion_->fail();
    future_->setError(std::current_exception());
    throw;
  }
  completion_->succeed();
  future_->markCompleted(c10::IValue(outputs_));
  return true;
}

void ExactWork::abort() { inner_->abort(); }

c10::intrusive_ptr<c10::ivalue::Future> ExactWork::getFuture() {
  if (completed_by_wait_ && !future_->completed()) {
    const WithoutPythonLock without_lock;  // torch asks for futures with the lock held
    wait();
  }
  return future_;
}

uint64_t ExactWork::getSequencenumber() const { return ticket_.sequence; }

float ExactWork::getDuration() const { return inner_->getDuration(); }

uint64_t ExactWork::getCompletionKey() const { return ticket_.key; }

}  // namespace distro::c10d_backend
