#pragma once

#include <array>

namespace distro::c10d_backend {

/// The answers to torch's questions about what a backend can do beyond its collectives, in one
/// place: torch asks by one supportsX() each today, and by one capabilities() after 2.15.
struct Capabilities {
  static constexpr bool splitting = true;
  /// False: then torch calls the `*_coalesced` collectives instead of a start and an end.
  static constexpr bool coalescing = false;
  static constexpr bool completion_hooks = true;
  static constexpr bool abort_hooks = true;
};

/// A virtual member of c10d::Backend that ProcessGroupDistro does not override.
struct InheritedMember {
  const char* name;
  const char* reason;
};

/// All of them, for torch 2.11 to 2.15: tests/bindings/test_backend_members.py fails when the torch
/// at hand has a virtual member that is neither overridden nor listed here.
inline constexpr std::array kInheritedMembers{
    // The base forwards the new names to the old ones, which are overridden.
    InheritedMember{"all_gather_single", "forwards to _allgather_base"},
    InheritedMember{"all_gather_single_coalesced", "forwards to allgather_into_tensor_coalesced"},
    InheritedMember{"reduce_scatter_single", "forwards to _reduce_scatter_base"},
    InheritedMember{"reduce_scatter_single_coalesced",
                    "forwards to reduce_scatter_tensor_coalesced"},
    InheritedMember{"all_to_all_single", "forwards to alltoall_base"},
    InheritedMember{"gather_single", "forwards to gather_into_tensor"},
    // What the base does is right.
    InheritedMember{"isInitialized", "true: the ranks have met when the constructor returns"},
    InheritedMember{"getBoundDeviceId", "kept by the base"},
    InheritedMember{"setBoundDeviceId", "kept by the base"},
    InheritedMember{"eagerConnectSingleDevice", "nothing to do: the ranks are connected already"},
    InheritedMember{"addEphemeralTimeout", "ignored, as the base documents"},
    // Refused: the base says no, or throws an error that names the backend and the member.
    InheritedMember{"startCoalescing", "no coalescing; torch calls the *_coalesced collectives"},
    InheritedMember{"endCoalescing", "no coalescing; torch calls the *_coalesced collectives"},
    InheritedMember{"supportsTimeEstimation", "a network between sites has no model to ask"},
    InheritedMember{"startTimeEstimate", "no time estimation"},
    InheritedMember{"endTimeEstimate", "no time estimation"},
    InheritedMember{"supportsShrinking", "a lost rank ends the group; restart it"},
    InheritedMember{"shrink", "a lost rank ends the group; restart it"},
    InheritedMember{"supportsReconfigure", "members are fixed when the group is made"},
    InheritedMember{"get_reconfigure_handle", "members are fixed when the group is made"},
    InheritedMember{"reconfigure", "members are fixed when the group is made"},
    InheritedMember{"merge", "members are fixed when the group is made"},
    InheritedMember{"supportsWindow", "no one-sided access between sites"},
    InheritedMember{"new_window", "no one-sided access between sites"},
    InheritedMember{"supportsTensorAlloc", "any tensor's memory will do"},
    InheritedMember{"allocateTensor", "any tensor's memory will do"},
    InheritedMember{"getMemAllocator", "any tensor's memory will do"},
    InheritedMember{"suspend", "no memory worth giving back for a while"},
    InheritedMember{"resume", "no memory worth giving back for a while"},
    InheritedMember{"getMemoryStats", "no memory pool of its own"},
    InheritedMember{"registerOnCompletionHook", "NCCL's; use registerCompletionHook"},
    InheritedMember{"waitForPendingWorks", "NCCL's; wait for the works themselves"},
};

}  // namespace distro::c10d_backend
