"""Sites that are network namespaces, with a torchrun in each: unchanged scripts, bytes counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

INTEGRATION = Path(__file__).resolve().parents[2] / "integration"
sys.path.insert(0, str(INTEGRATION))

from houses import Houses, measure  # noqa: E402


@pytest.fixture
def houses() -> Iterator[Houses]:
    try:
        made = Houses()
    except OSError as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield made
    made.close()


def test_of_a_script_that_shards_over_all_ranks_little_goes_between_houses(houses: Houses) -> None:
    row = measure(houses, "fsdp2_example.py", "distro", (6, 18))
    first, last = row["loss_first_and_last"]
    assert last < first
    assert row["modes"] == ["weights"]
    assert row["bytes_between_houses_a_step"] < row["gradient_bytes_a_step"] / 100
