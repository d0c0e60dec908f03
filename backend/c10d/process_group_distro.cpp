#include "backend/c10d/process_group_distro.h"

#include <fmt/format.h>

#include <utility>

#include "backend/c10d/errors.h"
#include "backend/c10d/exact_work.h"
#include "backend/c10d/python_lock.h"

namespace distro::c10d_backend {
ProcessGroupDistro::ProcessGroupDistro(std::shared_ptr<exchange::Group> group, InnerBackend inner)
    : Backend(group->rank(), group->world_size()),
      group_(std::move(group)),
      inner_(std::move(inner)) {
  init();
}

ProcessGroupDistro::~ProcessGroupDistro() {
  const WithoutPythonLock without_lock;  // closing may wait for peers
  group_->close();
}

c10::intrusive_ptr<c10d::Work> ProcessGroupDistro::exact(c10d::OpType operation, std::size_t bytes,
                                                         std::vector<at::Tensor> outputs,
                                                         const Start& start,
                                                         std::function<void()> last_act) {
  group_->counters().exact.fetch_add(1, std::memory_order_relaxed);
  group_->counters().exact_bytes.fetch_add(bytes, std::memory_order_relaxed);
  c10::intrusive_ptr<c10d::Work> inner_work;
  translate(*group_, c10d::opTypeToString(operation), [&] { inner_work = start(); });
  return c10::make_intrusive<ExactWork>(std::move(inner_work), group_, operation,
                                        std::move(outputs), std::move(last_act));
}

void ProcessGroupDistro::monitoredBarrier(const c10d::BarrierOptions& options,
                                          bool wait_all_ranks) {
  // Its own errors name the ranks that did not come.
  inner_->monitoredBarrier(options, wait_all_ranks);
}

void ProcessGroupDistro::setSequenceNumberForGroup() { inner_->setSequenceNumberForGroup(); }

uint64_t ProcessGroupDistro::getSequenceNumberForGroup() {
  return inner_->getSequenceNumberForGroup();
}

void ProcessGroupDistro::setTimeout(std::chrono::milliseconds timeout) {
  inner_->setTimeout(timeout);
}

void ProcessGroupDistro::shutdown() {
  group_->close();
  inner_->shutdown();
}

void ProcessGroupDistro::abort() {
  group_->abort(getRank(), fmt::format("rank {} has aborted its process group", getRank()));
  inner_->abort();
}

}  // namespace distro::c10d_backend
