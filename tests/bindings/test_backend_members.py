"""Every virtual member of the c10d::Backend at hand is overridden, or inherited on purpose."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch_distro._extension import SUPPORTED, _minor, extension

OURS = Path(__file__).parents[2] / "backend/c10d/process_group_distro.h"
THEIRS = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/Backend.hpp"


def _code(path: Path) -> str:
    """A header without comments and preprocessor lines."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"^[ ]*#[^\n]*", "", code, flags=re.MULTILINE)


def _virtual_members() -> set[str]:
    found = re.findall(r"\bvirtual\b[^;{}()]*?(\w+)\s*\(", _code(THEIRS))
    assert len(found) > 40, f"the pattern no longer fits {THEIRS}"
    return set(found)


def _declared_members() -> set[str]:
    """Names declared in ProcessGroupDistro (of what torch 2.11 lacks, without `override`)."""
    return set(re.findall(r"\b(\w+)\s*\([^;{}]*\)[^;{}()]*[;{]", _code(OURS)))


def test_every_virtual_member_is_overridden_or_inherited_on_purpose() -> None:
    inherited = extension().INHERITED_MEMBERS
    forgotten = _virtual_members() - _declared_members() - set(inherited)
    assert not forgotten, (
        f"torch {torch.__version__} has virtual members that ProcessGroupDistro neither overrides "
        f"nor lists in backend/c10d/capabilities.h: {sorted(forgotten)}"
    )
    both = _declared_members() & set(inherited)
    assert not both, f"overridden, and listed as not: {sorted(both)}"
    assert all(inherited.values())


def test_the_list_of_inherited_members_names_nothing_that_is_gone() -> None:
    if _minor(torch.__version__) != SUPPORTED[1]:
        return  # older torches lack the newer members
    gone = set(extension().INHERITED_MEMBERS) - _virtual_members()
    assert not gone, f"not in torch {torch.__version__} any more: {sorted(gone)}"
