"""Options of a process group, for ``pg_options``."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of one process group; what is given here wins over the DISTRO_ variables.

    Pass as ``init_process_group("distro", pg_options=torch_distro.Options(k=16))``. Values are
    checked when the group is made (a ``ValueError`` lists what is allowed), and all ranks must pass
    the same.

    Args:
        mode: ``auto`` (``weights`` where a wrapped module is found, exact elsewhere), ``weights``,
            ``ef`` (gradients are compressed, with error feedback), ``demo`` (DeMo: signs, for plain
            SGD), ``dense`` (everything exact).
        k: entries sent a step for each 4096 weights (10) or gradients (6), 1 to 4096.
        gain: what the mean of the ranks' moves is multiplied by: ``auto`` (square root of the
            number of ranks for optimizers that normalise, 1 for SGD) or a number.
        delay: 1: an exchange travels during the next step; 0: each step waits for it.
        site: a label, or ``host``: ranks that act as one participant. Differs from rank to rank.
        share: weight of a rank's unsent moves in its own weights: ``auto`` (gain / ranks; 1 where
            a gain is spread; with a gain of 1 and k above 64 at least 1/2) or 0 to 1.
        turns: of so many exchanges each looks at another part of the weights: ``auto`` (up to 16,
            the fewer the larger k) or 1 to 64.
        spread: steps over which what a gain adds to the mean comes: ``auto`` (0, all at once, where
            k is below 24, and up to 48 where it is large) or 0 to 10000.
        value_bits: 1 (sign and shared scale) or 32 (exact values).
        residual_bits: ``weights``: what is unsent is kept in 32 bits a weight (float32) or in 16
            (bfloat16).
        min_elements: ``ef``, ``demo``: elements of the smallest reduction that is compressed
            (4096).
        transform: ``ef``, ``demo``: ``dct`` (of blocks of 64 x 64) or ``none``.
        beta: ``ef``, ``demo``: decay of the unsent gradient at each step, 0 to 1 (1 in ``ef``,
            0.999 in ``demo``).
        reduce_scatter: ``ef``, ``demo``: ``exact``, or ``compress`` the reduce-scatter of FSDP.
        exact: what runs exact collectives: ``gloo`` (each rank to each, in the clear),
            ``transport`` (the same transport as the exchange), or ``auto``: ``gloo``.
        transport: ``tcp``, ``ipc`` (ranks of one host), ``inproc`` (ranks that are threads), or the
            path of a shared library (docs/transports.md).
        topology: ``mesh``, or ``hub``: everything goes by the ``relay``.
        relay: ``tcp://host:port`` of a ``torch-distro relay``.
        rate_limit: bytes a second that this rank sends at most.
        bind, advertise, ports: address or interface to bind, address told to peers, port range.
        insecure: allow plain text beyond loopback; for networks you trust only.
        threads: codec threads.
        stats: path of a JSON file of counters, written at exit, one a rank.
        log: ``warning``, ``info``, ``debug``, ``error``.
        isa: ``auto``, ``scalar``, ``avx2``, ``avx512``; for tests.
        curve_secret_file: path of this rank's secret key (``torch-distro keygen``), which no other
            user may be able to read. Differs from rank to rank.
        curve_peers_file: path of the file with the public keys of all ranks; with the one before.
    """

    mode: Literal["auto", "weights", "ef", "demo", "dense"] | None = None
    k: int | None = None
    gain: float | Literal["auto"] | None = None
    delay: Literal[0, 1] | None = None
    share: float | Literal["auto"] | None = None
    turns: int | Literal["auto"] | None = None
    spread: int | Literal["auto"] | None = None
    value_bits: int | None = None
    residual_bits: Literal[16, 32] | None = None
    transport: str | None = None
    topology: Literal["mesh", "hub"] | None = None
    bind: str | None = None
    advertise: str | None = None
    ports: str | int | None = None
    insecure: bool | None = None
    threads: int | None = None
    stats: str | None = None
    log: Literal["warning", "info", "debug", "error"] | None = None
    isa: Literal["auto", "scalar", "avx2", "avx512"] | None = None
    site: str | None = None
    min_elements: int | None = None
    relay: str | None = None
    rate_limit: int | None = None
    transform: Literal["dct", "none"] | None = None
    beta: float | None = None
    reduce_scatter: Literal["exact", "compress"] | None = None
    exact: Literal["auto", "gloo", "transport"] | None = None
    curve_secret_file: str | None = None
    curve_peers_file: str | None = None

    def overrides(self) -> dict[str, str]:
        """The options that are given, as the text that the DISTRO_ variables would hold."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _text(value) for name, value in given.items() if value is not None}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value)
