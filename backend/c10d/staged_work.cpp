#include "backend/c10d/staged_work.h"

#include <utility>

#include "backend/c10d/exact_work.h"
#include "backend/c10d/python_lock.h"
#include "backend/c10d/tensors.h"

namespace distro::c10d_backend {

void StagedWork::End::deliver() {
  staging.deliver([this] { future->markCompleted(c10::IValue(outputs)); });
}

StagedWork::StagedWork(c10::intrusive_ptr<c10d::Work> inner, c10d::OpType operation,
                       Staging staging)
    : Work(-1, operation),
      inner_(std::move(inner)),
      inner_future_(future_of(*inner_, operation)),
      end_(std::make_shared<End>(End{std::move(staging), {}, {}})) {
  end_->outputs = end_->staging.delivered();
  end_->future = c10::make_intrusive<c10::ivalue::Future>(
      c10::ListType::create(c10::TensorType::get()), devices_of(end_->outputs));
}

c10::intrusive_ptr<StagedWork> StagedWork::make(c10::intrusive_ptr<c10d::Work> inner,
                                                c10d::OpType operation, Staging staging) {
  auto work = c10::make_intrusive<StagedWork>(std::move(inner), operation, std::move(staging));
  if (work->inner_future_) {
    // Runs in the inner backend's thread (or here, if it is done already), and keeps this Work, as
    // torch's own threads do: whoever drops it need not wait for it.
    work->inner_future_->addCallback([work](c10::ivalue::Future& done) {
      std::exception_ptr error;
      try {
        if (done.hasError()) {
          std::rethrow_exception(done.exception_ptr());
        }
        work->end_->deliver();
      } catch (...) {
        error = std::current_exception();
        work->end_->future->setErrorIfNeeded(error);
      }
      work->finish(error);
    });
  }
  return work;
}

bool StagedWork::isCompleted() {
  return inner_future_ ? Work::isCompleted() : inner_->isCompleted();
}

void StagedWork::synchronize() {
  const WithoutPythonLock without_lock;
  end_->future->waitAndThrow();  // lets the current stream wait for the copies
}

bool StagedWork::wait(std::chrono::milliseconds timeout) {
  if (inner_future_) {
    return Work::wait(timeout);
  }
  const std::lock_guard lock(wait_mutex_);
  if (!end_->future->completed()) {
    std::exception_ptr error;
    try {
      inner_->wait(timeout);
      end_->deliver();
    } catch (...) {
      if (!inner_->isCompleted()) {
        throw;  // only this wait has timed out
      }
      error = std::current_exception();
      end_->future->setErrorIfNeeded(error);
    }
    finish(error);
  }
  synchronize();
  return true;
}

c10::intrusive_ptr<c10::ivalue::Future> StagedWork::getFuture() {
  return inner_future_ ? end_->future : Work::getFuture();
}

}  // namespace distro::c10d_backend
