"""Whatever a script does with collectives, distro gives what gloo gives."""

from __future__ import annotations

import os
import random

import pytest
import random_program
from ranks import run

SEED = int(os.environ.get("TEST_SEED", 0)) or random.SystemRandom().randrange(1, 2**31)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_random_program_of_collectives_equals_gloos_bit_for_bit(ranks: int) -> None:
    print(f"TEST_SEED={SEED}")
    ran = run(ranks, random_program.program, SEED, 300)
    assert sum(ran[0].values()) > 100
    assert len(ran[0]) > 15
