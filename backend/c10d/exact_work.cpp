#include "backend/c10d/exact_work.h"

#include <utility>

#include "backend/c10d/errors.h"
#include "backend/c10d/python_lock.h"

namespace distro::c10d_backend {
namespace {

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
  inner_future->addCallback([future = future_, group = group_, operation_name = operation_,
                             act = std::move(last_act)](c10::ivalue::Future& done) {
    if (done.hasError()) {
      future->setError(translated(*group, operation_name, done.exception_ptr()));
      return;
    }
    try {
      if (act) {
        act();
      }
      future->markCompleted(done.value());
    } catch (...) {
      future->setError(std::current_exception());
    }
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

bool ExactWork::wait(std::chrono::milliseconds timeout) {
  bool done = false;
  if (!completed_by_wait_) {
    try {
      done = inner_->wait(timeout);
    } catch (...) {
      if (!future_->completed()) {  // the wait itself timed out; otherwise the future has the
                                    // error, translated
        std::rethrow_exception(translated(*group_, operation_, std::current_exception()));
      }
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
    translate(*group_, operation_, [&] { done = inner_->wait(timeout); });
    if (last_act_) {
      last_act_();
    }
    future_->markCompleted(c10::IValue(outputs_));
  } catch (...) {
    future_->setError(std::current_exception());
    throw;
  }
  return done;
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
