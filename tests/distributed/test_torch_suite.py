"""A telling part of torch's own tests of a backend (all of them: compare.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = [
    "test_3_level_hierarchical_model_averager",
    "test_DistributedDataParallelCPU",
    "test_accumulate_gradients_no_sync",
    "test_all_gather_coalesced_with_empty",
    "test_all_gather_object_default_pg",
    "test_all_reduce_coalesced_full_group_product",
    "test_all_reduce_sum_async",
    "test_all_reduce_sum_complex",
    "test_barrier_timeout_*",
    "test_batch_isend_irecv_*",
    "test_broadcast_full_group",
    "test_ddp_buffer_hook_allreduce_return_future",
    "test_ddp_join_model_equivalence",
    "test_ddp_logging_data_cpu",
    "test_ddp_sync_module_states",
    "test_destroy_full_group",
    "test_gather_object",
    "test_invalid_static_graph",
    "test_irecv",
    "test_monitored_barrier_*",
    "test_new_subgroups_by_enumeration",
    "test_reduce_scatter_tensor_cpu",
    "test_scatter_object_list",
    "test_send_recv_any_source",
    "test_sparse_all_reduce_*",
    "test_static_graph_multi_forward",
]


# Of these, what shows the exact collectives over the group's own transport.
OVER_THE_TRANSPORT = [
    "test_DistributedDataParallelCPU",
    "test_all_gather_coalesced_with_empty",
    "test_all_reduce_sum_complex",
    "test_barrier_timeout_full_group",
    "test_batch_isend_irecv_gloo_tags",
    "test_monitored_barrier_gloo_rank_0_timeout",
    "test_send_recv_any_source",
    "test_sparse_all_reduce_sum",
]


def _outcomes(output: Path, tests: list[str], **environment: str) -> dict[str, dict[str, str]]:
    pytest.importorskip("expecttest", reason="torch's tests need it")
    command = [sys.executable, str(Path(__file__).with_name("torch_suite.py"))]
    command += ["--backend", "distro", "--ranks", "2", "--output", str(output), *tests]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes: dict[str, dict[str, str]] = json.loads(output.read_text())
    failed = {name: what["text"] for name, what in outcomes.items() if what["outcome"] == "failed"}
    assert not failed
    return outcomes


def _passed(outcomes: dict[str, dict[str, str]]) -> int:
    return sum(what["outcome"] == "passed" for what in outcomes.values())


def test_tests_of_torch_that_gloo_passes_pass_with_distro(tmp_path: Path) -> None:
    assert _passed(_outcomes(tmp_path / "outcomes.json", TESTS)) >= 20


def test_and_with_exact_collectives_over_the_transport(tmp_path: Path) -> None:
    outcomes = _outcomes(tmp_path / "outcomes.json", OVER_THE_TRANSPORT, SUITE_EXACT="transport")
    assert _passed(outcomes) == len(OVER_THE_TRANSPORT)
