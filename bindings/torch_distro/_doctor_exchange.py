"""One of the two ranks of the doctor's exchange: ``python -m torch_distro._doctor_exchange``."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import torch_distro

STEPS = 3


def main(path: str, rank: int) -> None:
    """Train a small module on random data and print what the doctor compares, as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "distro",
        store=dist.FileStore(path, 2),
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
        pg_options=torch_distro.Options(site=""),  # both are of this host, and are to exchange
    )
    torch.manual_seed(rank)
    module = DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    begin = time.monotonic()
    for _ in range(STEPS):
        loss = module(torch.randn(8, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch_distro.average(module)
    seconds = time.monotonic() - begin
    stats = torch_distro.stats()
    print(
        json.dumps(
            {
                "checksum": stats["reference_checksum"],
                "exchanges": stats["exchanges"],
                "payload_bytes": stats["payload_bytes_sent"],
                "gradient_bytes": stats["gradient_bytes"],
                "seconds": seconds,
                "transport": os.environ.get("DISTRO_TRANSPORT", "tcp"),
            }
        )
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
