#include "backend/c10d/inner_backend.h"

#include <unistd.h>

#include <utility>

#include "backend/c10d/interpreter_end.h"
#include "backend/c10d/python_lock.h"
#include "backend/exchange/error.h"

namespace distro::c10d_backend {

SharedBackend share(c10::intrusive_ptr<c10d::Backend> backend) {
  c10d::Backend* const raw = backend.get();
  return {raw, [owner = std::move(backend), process = ::getpid()](c10d::Backend*) mutable {
            if (::getpid() != process) {
              // A forked child: the threads that the destructor would join do not exist here.
              (void)owner.release();
              return;
            }
            const WithoutPythonLock without_lock;
            owner.reset();
          }};
}

InnerBackend::InnerBackend(c10::intrusive_ptr<c10d::Backend> backend)
    : state_(std::make_shared<State>()) {
  state_->backend = share(std::move(backend));
}

std::shared_ptr<c10d::Backend> InnerBackend::operator->() const {
  std::shared_ptr<c10d::Backend> backend;
  {
    const std::lock_guard lock(state_->mutex);
    backend = state_->backend;
  }
  if (!backend) {
    stay_if_interpreter_ends();
    throw exchange::ExchangeError("this process group has been destroyed");
  }
  return backend;
}

void InnerBackend::release() const noexcept {
  std::shared_ptr<c10d::Backend> last;  // destroyed after the lock is given back
  const std::lock_guard lock(state_->mutex);
  last.swap(state_->backend);
}

}  // namespace distro::c10d_backend
