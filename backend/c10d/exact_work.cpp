#include "backend/c10d/exact_work.h"

#include <utility>

#include "backend/c10d/errors.h"

namespace distro::c10d_backend {
namespace {

// Point-to-point Works of the inner backend have no future.
bool has_future(c10d::OpType operation) { return !c10d::isP2POp(operation); }

}  // namespace

ExactWork::ExactWork(c10::intrusive_ptr<c10d::Work> inner, std::shared_ptr<exchange::Group> group,
                     c10d::OpType operation, std::function<void()> last_act)
    : Work(group->rank(), operation),
      inner_(std::move(inner)),
      group_(std::move(group)),
      operation_(c10d::opTypeToString(operation)) {
  if (!has_future(operation)) {
    return;
  }
  const auto inner_future = inner_->getFuture();
  future_ = c10::make_intrusive<c10::ivalue::Future>(inner_future->elementType(),
                                                     inner_future->devices());
  // Runs in the inner backend's thread (or here, if it is done already). Holds no reference to this
  // Work.
  inner_future->addCallback([future = future_, group = group_, operation_name = operation_,
                             last_act = std::move(last_act)](c10::ivalue::Future& done) {
    if (done.hasError()) {
      future->setError(translated(*group, operation_name, done.exception_ptr()));
      return;
    }
    try {
      if (last_act) {
        last_act();
      }
      future->markCompleted(done.value());
    } catch (...) {
      future->setError(std::current_exception());
    }
  });
}

bool ExactWork::isCompleted() { return future_ ? future_->completed() : inner_->isCompleted(); }

bool ExactWork::isSuccess() const {
  return future_ ? future_->completed() && !future_->hasError() : inner_->isSuccess();
}

std::exception_ptr ExactWork::exception() const {
  if (!future_) {
    return inner_->exception();
  }
  return future_->hasError() ? future_->exception_ptr() : nullptr;
}

int ExactWork::sourceRank() const { return inner_->sourceRank(); }

std::vector<at::Tensor> ExactWork::result() { return inner_->result(); }

void ExactWork::synchronize() { wait(); }

bool ExactWork::wait(std::chrono::milliseconds timeout) {
  bool completed = false;
  translate(*group_, operation_, [&] { completed = inner_->wait(timeout); });
  if (future_) {
    future_->waitAndThrow();
  }
  return completed;
}

void ExactWork::abort() { inner_->abort(); }

c10::intrusive_ptr<c10::ivalue::Future> ExactWork::getFuture() {
  return future_ ? future_ : inner_->getFuture();
}

uint64_t ExactWork::getSequencenumber() const { return inner_->getSequencenumber(); }

}  // namespace distro::c10d_backend
