"""One rank of the bench: a DistributedDataParallel script that takes as many steps as it is told.

A number on standard input is answered by one line of JSON: the seconds of so many steps, and the
counters after them. At the end of the input it writes a last line and ends. The bench starts one on
each host.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_distro._wan.models import MODELS

# After so many steps PowerSGD compresses; DDP has rebuilt its buckets by then.
POWERSGD_START = 2
# More than any model of the bench has.
ONE_BUCKET_MIB = 4096
# Longer than any step of gloo that the bench waits for.
_TIMEOUT = datetime.timedelta(hours=1)


def add_hook(model: DistributedDataParallel, name: str) -> None:
    """One of torch's own communication hooks, as a user adds it."""
    if name == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        model.register_comm_hook(None, default_hooks.bf16_compress_hook)
    if name == "powersgd":
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=1, start_powerSGD_iter=POWERSGD_START
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("none", "gloo", "distro"), required=True)
    parser.add_argument("--hook", choices=("none", "powersgd", "bf16"), default="none")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--compute-seconds", type=float, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    together = args.backend != "none"
    if together:
        dist.init_process_group(args.backend, timeout=_TIMEOUT)
    torch.manual_seed(1)
    own = MODELS[args.model](args.compute_seconds)
    model: nn.Module = own
    if together:
        # PowerSGD's hook makes collectives in callbacks on Gloo's threads, and waits there: with
        # two buckets they come in different orders, or all threads wait, and the ranks hang.
        bucket_mib = ONE_BUCKET_MIB if args.hook == "powersgd" else None
        ddp = DistributedDataParallel(own, bucket_cap_mb=bucket_mib, gradient_as_bucket_view=True)
        add_hook(ddp, args.hook)
        model = ddp
    torch.manual_seed(int(os.environ["RANK"]))
    optimizer = own.optimizer()
    for line in sys.stdin:
        seconds = []
        cpu = time.process_time()
        for _ in range(int(line)):
            begin = time.perf_counter()
            model(own.inputs()).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - begin)
        answer: dict[str, Any] = {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - cpu,
            "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        if args.backend == "distro":
            import torch_distro

            answer["stats"] = torch_distro.stats()
        say(answer)
    if together:
        dist.barrier()
        dist.destroy_process_group()
    say({})


if __name__ == "__main__":
    main()
