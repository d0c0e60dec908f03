#pragma once

namespace distro::c10d_backend {

/// Called at the interpreter's exit, before the groups are closed: from then on only the calling
/// thread leaves a wait of this backend.
void begin_interpreter_end() noexcept;

/// At the end of a wait: a thread that is left over when the interpreter ends (a daemon thread)
/// stays here. It would ask for Python's lock, in vain, and be killed inside a destructor, which
/// aborts the process ("terminate called without an active exception").
void stay_if_interpreter_ends() noexcept;

}  // namespace distro::c10d_backend
