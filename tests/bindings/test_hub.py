"""A hub (DISTRO_TOPOLOGY=hub): ranks that know a relay only train as those of a mesh do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_collectives
import test_exact
import test_exact_transport
import test_groups
import torch
import torch_distro
from models import adamw, batches, flat, train, wrapped
from ranks import fail, run
from relays import Relay
from test_keys import environment, keygen


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay()
    yield made
    made.kill()


def _train(rank: int, size: int, steps: int = 12, pause: float = 0.0) -> dict[str, Any]:
    module = wrapped()
    losses = train(module, adamw(module), batches(rank, steps), lambda _: time.sleep(pause))
    stats = torch_distro.stats()
    torch_distro.average(module)
    return {"losses": losses, "weights": flat(module), "stats": stats}


def _expect_the_same(ours: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    for left, right in zip(ours, others, strict=True):
        assert left["losses"] == right["losses"]
        assert torch.equal(left["weights"], right["weights"])
        assert left["stats"]["reference_checksum"] == right["stats"]["reference_checksum"]
        assert left["stats"]["rejected_frames"] == 0


def test_it_trains_as_a_mesh_does_and_uploads_once(relay: Relay) -> None:
    mesh = run(4, _train, options={"exact": "transport"})
    hub = run(4, _train, env=relay.env)
    _expect_the_same(hub, mesh)
    for ours, others in zip(hub, mesh, strict=True):
        sent, per_peer = ours["stats"]["payload_bytes_sent"], others["stats"]["payload_bytes_sent"]
        assert 3 * sent == per_peer
    counted = relay.close()
    assert counted["rejected_frames"] == counted["refused_joins"] == 0
    assert counted["bytes_received"] < counted["bytes_sent"]


def _all_exact(rank: int, size: int) -> bool:
    test_exact._objects(rank, size)
    test_collectives._exchanges(rank, size)
    test_exact_transport._shapes(rank, size)
    test_exact_transport._messages(rank, size)
    return True


def test_exact_collectives_go_by_it_and_gloo_never_connects(relay: Relay, tmp_path: Path) -> None:
    assert keygen("--ranks", 3, "--relay", "--out", tmp_path).returncode == 0
    secured = Relay(tmp_path)
    try:
        for env in ([relay.env] * 3, [secured.env | environment(tmp_path, r) for r in range(3)]):
            run(3, test_exact_transport._without_gloo, _all_exact, env=env)
        assert secured.close()["rejected_connections"] == 0
    finally:
        secured.kill()


def test_groups_of_some_ranks_have_their_places_there(relay: Relay) -> None:
    run(4, test_exact_transport._without_gloo, test_groups._meshes, env=relay.env)


def test_a_relay_that_is_killed_and_comes_back_costs_nothing_but_time(tmp_path: Path) -> None:
    assert keygen("--ranks", 3, "--relay", "--out", tmp_path).returncode == 0
    env = [environment(tmp_path, rank) for rank in range(3)]
    undisturbed = run(3, _train, 40, env=env)
    relay = Relay(tmp_path)
    ended = threading.Event()
    kills = 0

    def disturb() -> None:
        nonlocal relay, kills
        while not ended.wait(0.4):
            relay.kill()
            relay = Relay(tmp_path, relay.port)
            kills += 1

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        disturbed = run(3, _train, 40, 0.05, env=[relay.env | own for own in env])
    finally:
        ended.set()
        disturbing.join()
        relay.kill()
    _expect_the_same(disturbed, undisturbed)
    assert kills >= 2
    assert sum(own["stats"]["reconnects"] for own in disturbed) > 0


def test_only_the_leaders_of_sites_use_it(relay: Relay) -> None:
    labels = [{"DISTRO_SITE": label} for label in ("berlin", "berlin", "lyon", "lyon")]
    mesh = run(4, _train, env=labels, options={"exact": "transport"})
    hub = run(4, _train, env=[relay.env | label for label in labels])
    _expect_the_same(hub, mesh)
    assert [own["stats"]["payload_bytes_sent"] > 0 for own in hub] == [True, False, True, False]


def _fail_in_training(rank: int, size: int) -> None:
    module = wrapped()

    def fail_there(step: int) -> None:
        if rank == 1 and step == 4:
            with torch.no_grad():
                module.module.norm.bias[3] = float("nan")

    train(module, adamw(module), batches(rank, 9), fail_there)


def test_what_breaks_one_rank_is_an_error_on_all_that_names_it(relay: Relay) -> None:
    for error in fail(3, _fail_in_training, env=relay.env):
        assert error.kind == "DistBackendError"
        assert "rank 1" in error.message


def test_a_relay_that_is_not_there_is_named_within_the_timeout(relay: Relay) -> None:
    relay.kill()
    errors = fail(2, _train, env=relay.env, timeout=4)
    assert {error.kind for error in errors} == {"DistBackendError"}
    # The second to find out may see that the first has ended because of it.
    named = f"the relay {relay.endpoint} has not been reached"
    assert any(named in error.message for error in errors), errors


def test_a_hub_without_keys_beyond_loopback_is_refused_with_what_to_do() -> None:
    env = {"DISTRO_TOPOLOGY": "hub", "DISTRO_RELAY": "tcp://192.0.2.7:29600"}
    for error in fail(2, _train, env=env, timeout=20):
        assert "keys" in error.message
        assert "torch-distro keygen" in error.message
