"""A rank that dies or hangs is named to all others, whatever the group was doing."""

from __future__ import annotations

import pytest
from faults import OTHERS, blame

KINDS = ["all_reduce", "ring", "all_to_all_single", "reduce_scatter_tensor", *OTHERS]


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_both_survivors_name_the_rank(fault: str) -> None:
    assert not blame(KINDS, fault)
