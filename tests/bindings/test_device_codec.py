"""The codec of devices, on the CPU and on a GPU: the records and reference of the host, by bit."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_distro
from codec_ranks import FLOATS, GAIN, SHAPES, SHARE, Ranks, assert_equal, assert_same, devices
from models import batches, flat, train, wrapped
from ranks import run
from torch_distro._extension import extension


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize(
    ("k", "value_bits", "dtypes"),
    [
        (6, 1, [torch.float32] * len(SHAPES)),
        (64, 32, [FLOATS[i % 4] for i in range(len(SHAPES))]),
        (64, 1, [torch.bfloat16] * len(SHAPES)),
        (4096, 32, [torch.float64] * len(SHAPES)),
        (4096, 1, [FLOATS[(i * 3 + 2) % 4] for i in range(len(SHAPES))]),
    ],
)
@pytest.mark.parametrize(
    ("turns", "spread", "share", "residual_bits"),
    [
        (1, 0, SHARE, 32),
        (1, 7, SHARE, 32),
        (5, 0, SHARE, 32),
        (5, 20, SHARE, 32),
        (1, 0, 1, 32),
        (5, 0, 1, 32),
        (5, 20, 1, 32),
        (1, 0, SHARE, 16),
        (5, 20, SHARE, 16),
        (5, 0, 1, 16),
    ],
)
@devices
def test_records_reference_and_weights_are_those_of_the_host_codec(
    delay: int,
    k: int,
    value_bits: int,
    dtypes: list[torch.dtype],
    turns: int,
    spread: int,
    share: float,
    residual_bits: int,
    device: str,
) -> None:
    kinds = [
        Ranks(
            on, dtypes, k, value_bits,
            turns=turns, spread=spread, share=share, residual_bits=residual_bits,
        )
        for on in (None, torch.device(device))
    ]  # fmt: skip
    for ranks in kinds:
        for step in range(12):
            ranks.step(step, delay)
    assert_same(*kinds)


@devices
def test_tensors_of_whole_rounds_of_turns_are_those_of_the_host_codec(device: str) -> None:
    shapes = [(64, 80), (80,), (160,), (80, 96), (96000,)]
    dtypes = [torch.float32] * 3 + [torch.bfloat16] * 2
    kinds = [Ranks(on, dtypes, 6, 1, turns=5, shapes=shapes) for on in (None, torch.device(device))]
    for ranks in kinds:
        for step in range(12):
            ranks.step(step, delay=1)
    assert_same(*kinds)


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("residual_bits", [16, 32])
@devices
def test_what_follows_a_mean_is_as_with_the_host_codec(
    turns: int, residual_bits: int, device: str
) -> None:
    kinds = [
        Ranks(
            on, [torch.float32] * len(SHAPES), 64, 1,
            ranks=1, turns=turns, share=1, residual_bits=residual_bits,
        )
        for on in (None, torch.device(device))
    ]  # fmt: skip
    for ranks in kinds:
        (codec,), (x,) = ranks.codecs, ranks.x
        for step in range(4):
            ranks.step(step, delay=1)
        assert codec.begin(x) is None
        ranks.move(4)
        outcome = codec.advance(x, 1, None, 0.0, 1.0)
        ranks.note([outcome])
        ranks.in_flight, ranks.number = [outcome[0]], 1
        for step in range(5, 8):
            ranks.step(step, delay=1)
    assert_same(*kinds)


@pytest.mark.parametrize("share", [SHARE, 1.0])
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("residual_bits", [16, 32])
@pytest.mark.parametrize("delay", [0, 1])
@devices
def test_another_share_and_back_is_as_with_the_host_codec(
    share: float, turns: int, residual_bits: int, delay: int, device: str
) -> None:
    kinds = [
        Ranks(
            on, [torch.float32] * len(SHAPES), 6, 1,
            turns=turns, share=share, residual_bits=residual_bits,
        )
        for on in (None, torch.device(device))
    ]  # fmt: skip
    for ranks in kinds:
        for other in (SHARE, 1.0, 0.75, share):
            for step in range(3):
                ranks.step(step, delay)
            for codec, x in zip(ranks.codecs, ranks.x, strict=True):
                codec.reshare(x, ranks.share, other)
            ranks.share = other
    assert_same(*kinds)


@pytest.mark.parametrize(
    ("turns", "spread", "residual_bits"),
    [(1, 0, 32), (2, 0, 32), (2, 9, 32), (1, 0, 16), (2, 9, 16)],
)
@devices
def test_a_marked_step_a_state_and_a_resume_are_those_of_the_host_codec(
    turns: int, spread: int, residual_bits: int, device: str
) -> None:
    dtypes = [FLOATS[i % 4] for i in range(len(SHAPES))]
    states = []
    for on in (None, torch.device(device)):
        ranks = Ranks(on, dtypes, 6, 1, turns=turns, spread=spread, residual_bits=residual_bits)
        for step in range(3):
            ranks.step(step, delay=1)
        for rank, codec in enumerate(ranks.codecs):
            codec.apply(ranks.due(rank))  # x is the script's
        ranks.move(3)
        checksum = ranks.codecs[0].checksum
        saved = ranks.codecs[1].state(ranks.x[1], SHARE)
        resumed = ranks.make()
        resumed.restore_state(saved)
        assert resumed.checksum == checksum
        x = [torch.zeros_like(tensor) for tensor in ranks.x[1]]
        resumed.leave(x, SHARE)
        record, move = resumed.advance(x, 4, None, SHARE, SHARE)
        assert move < 1e-6
        tensors = [tensor for parts in saved for tensor in parts] + [tensor.cpu() for tensor in x]
        resumed.reshare(x, SHARE, 0.8)
        tensors += [tensor.to("cpu", copy=True) for tensor in x]
        states.append((checksum, record, resumed.empty_record(5), tensors))
    assert states[0][:3] == states[1][:3]
    assert_equal(states[0][3], states[1][3])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -(2.0**101)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_non_finite_weight_is_named_and_nothing_changes(bad: float, dtype: torch.dtype) -> None:
    ranks = Ranks(torch.device("cpu"), [dtype] * len(SHAPES), 6, 1)
    codec, x = ranks.codecs[0], ranks.x[0]
    checksum, state = codec.checksum, codec.state(x, SHARE)
    broken = [tensor.clone() for tensor in x]
    broken[6][4321] = bad
    broken[7][3] = bad
    assert codec.advance(broken, 1, None, SHARE, SHARE) == 6
    assert codec.encode(broken, 1, SHARE) == 6
    assert codec.begin(broken) == 6
    assert codec.checksum == checksum
    for before, after in zip(state, codec.state(x, SHARE), strict=True):
        assert_equal(before, after)


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_weights_that_become_non_finite_before_they_are_settled_are_refused(
    device: torch.device | None,
) -> None:
    ranks = Ranks(device, [torch.float32] * len(SHAPES), 6, 1, ranks=1, share=1)
    (codec,), (x,) = ranks.codecs, ranks.x
    ranks.move(0)
    record, _ = codec.encode(x, 1, 1.0)
    x[6][4321] = float("nan")
    with pytest.raises(RuntimeError, match=r"between encode\(\) and settle\(\)"):
        codec.settle(x, ([record], 0, GAIN, 1), 1.0)


@pytest.mark.parametrize("residual_bits", [16, 32])
@devices
def test_memory_taken_in_inference_mode_is_changed_outside_of_it(
    residual_bits: int, device: str
) -> None:
    dtypes = [torch.float32] * len(SHAPES)
    kinds = [
        Ranks(on, dtypes, 6, 1, share=1, spread=7, residual_bits=residual_bits)
        for on in (None, torch.device(device))
    ]
    for ranks in kinds:
        ranks.step(0, delay=1)
        with torch.inference_mode():
            for rank, (codec, x) in enumerate(zip(ranks.codecs, ranks.x, strict=True)):
                codec.apply(ranks.due(rank))
                codec.reshare(x, 1.0, SHARE)
        ranks.share, ranks.in_flight = SHARE, None
        for step in range(1, 4):
            ranks.step(step, delay=1)
    assert_same(*kinds)


def test_tensors_that_do_not_fit_are_refused() -> None:
    ranks = Ranks(torch.device("cpu"), [torch.float32] * len(SHAPES), 6, 1)
    with pytest.raises(ValueError, match="elements"):
        ranks.codecs[0].encode([tensor.flatten()[:1] for tensor in ranks.x[0]], 1, SHARE)


def _use_device_codec() -> None:
    """Give the modules of this process the codec of devices, as if they lay on one."""
    core: Any = extension()
    original = core.ModuleSynchroniser

    class OnDevice:
        attach = original.attach

        def __new__(cls, *args: Any) -> Any:  # noqa: ANN401 - the extension's class
            return original(*args, device_codec=True)

    core.ModuleSynchroniser = OnDevice


def _mixed(rank: int, size: int, delay: str) -> dict[str, Any]:
    if rank == 1:
        _use_device_codec()
    module = wrapped()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    checksums: list[int] = []

    def after(step: int) -> None:
        checksums.append(torch_distro.stats()["reference_checksum"])
        if step == 4 and rank == 0:
            torch_distro.resync(module)

    train(module, optimizer, batches(rank, 9), after)
    saved = torch_distro.state_dict(module)
    torch_distro.average(module)
    train(module, optimizer, batches(rank, 3), after)
    torch_distro.average(module)
    return {
        "checksums": checksums,
        "mean": flat(module),
        "resyncs": torch_distro.stats()["resyncs"],
        "reference": torch.cat([w.flatten() for w in saved["reference"].values()]),
    }


@pytest.mark.parametrize("delay", ["0", "1"])
def test_ranks_with_either_codec_hold_one_reference(delay: str) -> None:
    results = run(2, _mixed, delay, env={"DISTRO_DELAY": delay})
    first = results[0]
    assert len(set(first["checksums"])) >= 9
    assert first["resyncs"] == 1
    for other in results[1:]:
        assert other["checksums"] == first["checksums"]
        assert other["resyncs"] == 1
        assert torch.equal(other["mean"], first["mean"])
        assert torch.equal(other["reference"], first["reference"])


def _taken_bytes(device: str) -> int:
    """By this process."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.parametrize(
    ("share", "residual_bits", "bytes_a_weight"), [(SHARE, 32, 8), (SHARE, 16, 6), (1.0, 32, 4)]
)
@devices
def test_memory_between_steps_is_that_of_the_reference_and_the_residual(
    share: float, residual_bits: int, bytes_a_weight: int, device: str
) -> None:
    weights = 1 << 24
    on = torch.device(device)
    for count in (1 << 16, weights):  # the first one: what any codec takes once
        before = _taken_bytes(device)
        codec = extension().Codec([count], 6, 1, on, turns=16, residual_bits=residual_bits)
        x = torch.zeros(count, device=on)
        assert codec.begin([x]) is None
        for number in range(1, 4):
            x += 0.01
            codec.advance([x], number, None, share, share)
        taken = (_taken_bytes(device) - before) / weights - x.element_size()
    print(f"{device}, share {share}, R of {residual_bits} bits: {taken:.2f} bytes a weight")
    assert taken == pytest.approx(bytes_a_weight, abs=0.2)
