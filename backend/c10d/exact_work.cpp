#include "backend/c10d/exact_work.h"

#include <fmt/format.h>

#include <torch/csrc/distributed/c10d/exception.h>
#include <atomic>
#include <utility>

#include "backend/c10d/errors.h"
#include "backend/c10d/python_lock.h"
#include "backend/c10d/tensors.h"

namespace distro::c10d_backend {

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

namespace {

c10::intrusive_ptr<c10d::Work> started(exchange::Group& group, const std::string& operation,
                                       const ExactWork::Start& start) {
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
};

ExactWork::ExactWork(const Call& call, std::shared_ptr<exchange::Group> group,
                     std::shared_ptr<Operations> operations, const Start& start,
                     std::function<void()> last_act)
    : Work(group->rank(), call.type, call.title, call.inputs),
      group_(std::move(group)),
      operation_(c10d::opTypeToString(call.type)),
      outputs_(call.outputs),
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
    if (done.hasError()) {
      completion->fail();
      future->setError(translated(*group, operation_name, done.exception_ptr()));
      return;
    }
    try {
      if (act) {
        act();
      }
    } catch (...) {
      completion->fail();
      future->setError(std::current_exception());
      return;
    }
    completion->succeed();
    future->markCompleted(act ? c10::IValue(outputs) : done.value());
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

bool ExactWork::wait(std::chrono::milliseconds timeout) {
  return completed_by_wait_ ? wait_by_inner(timeout) : wait_by_future(timeout);
}

void ExactWork::throw_not_done(std::chrono::milliseconds timeout) const {
  C10_THROW_ERROR(DistBackendError,
                  fmt::format("rank {}: {} is not done after the {} ms that wait() was given; it "
                              "goes on and may be waited for again",
                              group_->rank(), operation_, timeout.count()));
}

bool ExactWork::wait_by_future(std::chrono::milliseconds timeout) {
  bool done = true;
  if (!future_->completed()) {
    try {
      done = inner_->wait(timeout);
    } catch (...) {
      if (!inner_->isCompleted()) {
        throw_not_done(timeout);
      }
      // The future is about to have the error, translated.
    }
  }
  future_->waitAndThrow();
  return done;
}

bool ExactWork::wait_by_inner(std::chrono::milliseconds timeout) {
  const std::lock_guard lock(wait_mutex_);
  if (future_->completed()) {
    future_->waitAndThrow();
    return true;
  }
  bool done = false;
  try {
    translate(*group_, operation_, [&] { done = inner_->wait(timeout); });
    if (last_act_) {
      last_act_();
    }
  } catch (...) {
    if (timeout != kNoTimeout && !inner_->isCompleted()) {
      throw_not_done(timeout);
    }
    completion_->fail();
    future_->setError(std::current_exception());
    throw;
  }
  completion_->succeed();
  future_->markCompleted(c10::IValue(outputs_));
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

uint64_t ExactWork::getSequencenumber() const { return ticket_.sequence; }

float ExactWork::getDuration() const { return inner_->getDuration(); }

uint64_t ExactWork::getCompletionKey() const { return ticket_.key; }

}  // namespace distro::c10d_backend
