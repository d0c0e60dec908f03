#include <Python.h>

#include "backend/c10d/inner_backend.h"

#include <utility>

namespace distro::c10d_backend {
namespace {

// Gives up Python's lock for a scope, if this thread holds it.
class WithoutLock {
 public:
  WithoutLock()
      : state_(Py_IsInitialized() != 0 && PyGILState_Check() != 0 ? PyEval_SaveThread() : nullptr) {
  }
  ~WithoutLock() {
    if (state_ != nullptr) {
      PyEval_RestoreThread(state_);
    }
  }
  WithoutLock(const WithoutLock&) = delete;
  WithoutLock& operator=(const WithoutLock&) = delete;

 private:
  PyThreadState* const state_;
};

}  // namespace

InnerBackend share(c10::intrusive_ptr<c10d::Backend> backend) {
  c10d::Backend* const raw = backend.get();
  return {raw, [owner = std::move(backend)](c10d::Backend*) mutable {
            const WithoutLock without_lock;
            owner.reset();
          }};
}

}  // namespace distro::c10d_backend
