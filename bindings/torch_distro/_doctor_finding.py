"""What a check of ``torch-distro doctor`` finds."""

from __future__ import annotations

import dataclasses

LEVELS = ("ok", "warning", "failed")
"""From good to bad."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        check: what was looked at.
        level: one of :data:`LEVELS`; ``failed``: a training would not start, or not as asked.
        found: what is the case.
        advice: what to do about it; empty where nothing is to be done.
    """

    check: str
    level: str
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "warning", found, advice)


def failed(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "failed", found, advice)
