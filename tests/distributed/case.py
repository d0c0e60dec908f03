"""torch's own DistributedTest, on the backend and ranks of this process's environment.

Imported by the launcher of one configuration and by its ranks, after SUITE_BACKEND,
WORLD_SIZE and TEMP_DIR are set; SUITE_EXACT is what runs exact collectives (gloo). The tests decide
by the name in BACKEND, when they are imported, whether they apply. It says gloo then, whatever the
backend under test: what gloo can do, distro must be able to do.
"""

from __future__ import annotations

import fnmatch
import os
from typing import Any
from unittest import mock

import torch.distributed as dist
import torch.multiprocessing as mp

BACKEND = os.environ["SUITE_BACKEND"]
os.environ["BACKEND"] = "gloo"

import torch_distro  # noqa: E402
from torch.testing._internal.common_distributed import DistTestCases  # noqa: E402
from torch.testing._internal.distributed import distributed_test  # noqa: E402
from torch_distro import _backend  # noqa: E402

for feature in ("ddp", "subgroup", "plugin"):
    DistTestCases.backend_feature[feature].add("distro")
distributed_test.BACKEND = BACKEND
for supported in ("PROFILING_SUPPORTED_BACKENDS", "SEND_RECV_PROFILING_SUPPORTED_BACKENDS"):
    getattr(distributed_test, supported).append("distro")

if exact := os.environ.get("SUITE_EXACT"):
    # The tests make their groups without pg_options.
    given = torch_distro.Options(exact=exact).overrides()  # type: ignore[arg-type]
    _backend._default_overrides = lambda: dict(given)

# Tests that compare gradients or weights of a wrapped module with what an exact all-reduce gives.
EXACT_GRADIENTS = ["test_DistributedDataParallel*", "test_accumulate_gradients_no_sync*"]


def mode_of(test: str) -> str:
    """The DISTRO_MODE in which a test runs."""
    exact = any(fnmatch.fnmatchcase(test, pattern) for pattern in EXACT_GRADIENTS)
    return "dense" if exact else "auto"


class TestDistributed(
    distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase
):  # type: ignore[name-defined, misc]
    """Each test runs as every rank, forked from a server that has torch and the tests loaded."""

    def setUp(self) -> None:
        super().setUp()
        self._spawn_processes()

    def _spawn_processes(self) -> None:
        # The server's environment is that of its start, but each test has a folder of its own.
        folder = os.environ["TEMP_DIR"]

        def process(*, kwargs: dict[str, Any], **others: Any) -> Any:  # noqa: ANN401
            context = mp.get_context("forkserver")
            return context.Process(kwargs={**kwargs, "folder": folder}, **others)

        self._start_processes(process)

    def run_test(self, test_name: str, parent_pipe: Any) -> None:  # noqa: ANN401
        if test_name.startswith("test_accumulate_gradients_no_sync"):
            distributed_test.BACKEND = "gloo"  # they make their module for known names only
        super().run_test(test_name, parent_pipe)

    def test_ddp_logging_data_cpu(self) -> None:
        name = "custom" if BACKEND == "distro" else BACKEND  # torch's name for every plug-in
        with mock.patch.object(dist, "get_backend", return_value=name):
            super().test_ddp_logging_data_cpu()

    @classmethod
    def _run(cls, rank: int, test_name: str, *arguments: Any, **others: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        os.environ["TEMP_DIR"] = others.pop("folder")
        if BACKEND == "distro":
            os.environ["DISTRO_MODE"] = os.environ.get("SUITE_MODE") or mode_of(test_name)
        super()._run(rank, test_name, *arguments, **others)
