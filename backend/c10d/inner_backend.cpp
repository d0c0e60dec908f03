#include "backend/c10d/inner_backend.h"

#include <utility>

#include "backend/c10d/python_lock.h"

namespace distro::c10d_backend {
InnerBackend share(c10::intrusive_ptr<c10d::Backend> backend) {
  c10d::Backend* const raw = backend.get();
  return {raw, [owner = std::move(backend)](c10d::Backend*) mutable {
            const WithoutPythonLock without_lock;
            owner.reset();
          }};
}

}  // namespace distro::c10d_backend
