#pragma once

#include <Python.h>

namespace distro::c10d_backend {

/// Gives up Python's lock for a scope, if this thread holds it: for waits on threads that may need
/// the lock to free a tensor.
class WithoutPythonLock {
 public:
  WithoutPythonLock()
      : state_(Py_IsInitialized() != 0 && PyGILState_Check() != 0 ? PyEval_SaveThread() : nullptr) {
  }
  ~WithoutPythonLock() {
    if (state_ != nullptr) {
      PyEval_RestoreThread(state_);
    }
  }
  WithoutPythonLock(const WithoutPythonLock&) = delete;
  WithoutPythonLock& operator=(const WithoutPythonLock&) = delete;

 private:
  PyThreadState* const state_;
};

}  // namespace distro::c10d_backend
