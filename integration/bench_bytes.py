"""Bytes of an exchange for GPT-2 small: all 148 tensors, norms and biases included.

Two or more real processes exchange random moves through the installed backend. Prints JSON: the
payload (records, headers included) against the gradients in fp32 and bf16, and what ZeroMQ was
given against the payload.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.distributed as dist
import torch_distro
from spawn import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def gpt2_small(width: int = 768, layers: int = 12) -> list[tuple[int, ...]]:
    """Shapes of GPT-2 small's parameters (the head is tied to the embedding)."""
    block: list[tuple[int, ...]] = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(50257, width), (1024, width), *(block * layers), (width,), (width,)]


class Parameters(nn.Module):
    """Parameters of these shapes and nothing else; the loss touches one element of each."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.all = nn.ParameterList(torch.zeros(shape) for shape in shapes)

    def forward(self) -> torch.Tensor:
        return torch.stack([parameter.flatten()[0] for parameter in self.all]).sum()


def train(rank: int, ranks: int, steps: int, options: dict[str, int]) -> dict[str, float]:
    """Exchange moves of a random size and sign; the counters of this rank."""
    dist.init_process_group("distro", pg_options=torch_distro.Options(**options))  # type: ignore[arg-type]
    module = DistributedDataParallel(Parameters(gpt2_small()), init_sync=False)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        module().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.empty_like(parameter).normal_(0, 1e-3, generator=generator))
    module().backward()  # the last step's moves go out with the next forward
    return torch_distro.stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--k", type=int, default=6)
    args = parser.parse_args()
    stats = run_ranks(args.ranks, train, args.steps, {"k": args.k})[0]
    # As the DisTrO report counts: the gradient to every peer against the payload to every peer.
    payload = stats["payload_bytes_sent"] / (args.ranks - 1)
    print(
        json.dumps(
            {
                "model": "GPT-2 small",
                "parameters": sum(torch.Size(shape).numel() for shape in gpt2_small()),
                "ranks": args.ranks,
                "k": args.k,
                "exchanges": stats["exchanges"],
                "payload_bytes_an_exchange_and_peer": payload / stats["exchanges"],
                "gradient_fp32_to_payload": stats["gradient_bytes"] / payload,
                "gradient_bf16_to_payload": stats["gradient_bytes"] / 2 / payload,
                "socket_to_payload_sent": stats["socket_bytes_sent"] / stats["payload_bytes_sent"],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
