#include "backend/c10d/exact_work.h"

#include <algorithm>
#include <utility>

#include "backend/c10d/errors.h"
#include "backend/c10d/interpreter_end.h"
#include "backend/c10d/python_lock.h"

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

// Null where the inner Work has no future: it does its last part in wait().
c10::intrusive_ptr<c10::ivalue::Future> future_of(c10d::Work& work, c10d::OpType operation) {
  if (c10d::isP2POp(operation)) {
    return nullptr;
  }
  try {
    return work.getFuture();
  } catch (const c10::Error&) {
    return nullptr;
  }
}

// Pass on what the inner future got.
void complete(c10::ivalue::Future& future, exchange::Group& group, const std::string& operation,
              const std::function<void()>& last_act, c10::ivalue::Future& done) {
  if (done.hasError()) {
    future.setError(translated(group, operation, done.exception_ptr()));
    return;
  }
  try {
    if (last_act) {
      last_act();
    }
    future.markCompleted(done.value());
  } catch (...) {
    future.setError(std::current_exception());
  }
}

}  // namespace

ExactWork::ExactWork(c10::intrusive_ptr<c10d::Work> inner, std::shared_ptr<exchange::Group> group,
                     c10d::OpType operation, std::vector<at::Tensor> outputs,
                     std::function<void()> last_act)
    : Work(group->rank(), operation),
      inner_(std::move(inner)),
      group_(std::move(group)),
      operation_(c10d::opTypeToString(operation)),
      outputs_(std::move(outputs)) {
  const auto inner_future = future_of(*inner_, operation);
  if (!inner_future) {
    future_ =
        c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    completed_by_wait_ = true;
    last_act_ = std::move(last_act);
    return;
  }
  future_ = c10::make_intrusive<c10::ivalue::Future>(inner_future->elementType(),
                                                     inner_future->devices());
  // Runs in the inner backend's thread (or here, if it is done already). Holds no reference to this
  // Work.
  inner_future->addCallback([future = future_, completion = completion_, group = group_,
                             operation_name = operation_,
                             act = std::move(last_act)](c10::ivalue::Future& done) {
    complete(*future, *group, operation_name, act, done);
    const std::lock_guard lock(completion->mutex);
    completion->done = true;
    completion->changed.notify_all();
  });
}

bool ExactWork::isCompleted() {
  return completed_by_wait_ ? inner_->isCompleted() : future_->completed();
}

bool ExactWork::isSuccess() const {
  return completed_by_wait_ ? inner_->isSuccess() : future_->completed() && !future_->hasError();
}

std::exception_ptr ExactWork::exception() const {
  if (completed_by_wait_) {
    return inner_->exception();
  }
  return future_->hasError() ? future_->exception_ptr() : nullptr;
}

int ExactWork::sourceRank() const { return inner_->sourceRank(); }

std::vector<at::Tensor> ExactWork::result() { return inner_->result(); }

void ExactWork::synchronize() {
  const WithoutPythonLock without_lock;
  wait();
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

void ExactWork::wait_for_future(milliseconds timeout) {
  const Deadline deadline = until(timeout);
  Deadline give_up_at = Deadline::max();
  std::unique_lock lock(completion_->mutex);
  while (!completion_->done) {
    const auto now = transport::Clock::now();
    if (now >= deadline) {
      fail_wait(*group_, operation_, timeout);
    }
    completion_->changed.wait_until(lock, std::min(deadline, now + kLookAgain));
    if (!completion_->done) {
      check_lost(give_up_at);
    }
  }
}

// Of send and receive a wait that times out breaks the inner backend's connections, so they wait in
// one piece. Others may be waited for in slices. They don't tell a slice that has passed from a
// failure, nor (gloo's reduce-scatter) whether they are complete; but what has failed says so at
// once.
void ExactWork::wait_for_inner(milliseconds timeout) {
  if (c10d::isP2POp(retrieveOpType())) {
    inner_->wait(timeout);
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
      fail_wait(*group_, operation_, timeout);
    }
    check_lost(give_up_at);
  }
}

bool ExactWork::wait(milliseconds timeout) {
  struct AtEnd {
    ~AtEnd() { stay_if_interpreter_ends(); }
  };
  const AtEnd at_end;
  if (!completed_by_wait_) {
    wait_for_future(timeout);
    bool done = false;
    try {
      done = inner_->wait(kNoTimeout);
    } catch (...) {
      // The future has it, translated.
    }
    future_->waitAndThrow();
    return done;
  }
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
    future_->markCompleted(c10::IValue(outputs_));
  } catch (...) {
    future_->setError(std::current_exception());
    throw;
  }
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

uint64_t ExactWork::getSequencenumber() const { return inner_->getSequencenumber(); }

}  // namespace distro::c10d_backend
