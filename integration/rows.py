"""The rows of the matrix: which scripts, how they are started, what is expected of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "frameworks"


@dataclass(frozen=True)
class Row:
    """One script and one way to start it.

    Attributes:
        name: of the row.
        file: the script.
        compressed: whether something in it is compressed by default; else it must equal gloo.
        gradients: whether something in it is compressed in the gradient modes; as `compressed` if
            not said.
        arguments: beside the backend's name; ``{folder}`` is an empty folder of the run.
        backend: flag that takes the name; none where DISTRO_DEFAULT=1 has to find it.
        needs: package without which the script cannot run.
        ranks: number of processes.
        sites: into how many sites (DISTRO_SITE) they are parted, in modes that know sites.
        again: whether it is started a second time, to go on from its checkpoint, with these
            arguments more.
        says: what the log of every rank says once a run, in the default mode.
    """

    name: str
    file: str
    compressed: bool = True
    arguments: tuple[str, ...] = ()
    backend: str | None = "--backend"
    needs: str = "torch"
    ranks: int = 2
    sites: int = 1
    again: tuple[str, ...] | None = None
    says: str = ""
    gradients: bool | None = None

    def compresses(self, mode: str) -> bool:
        """Whether something in it is compressed in this mode."""
        if mode in ("ef", "demo") and self.gradients is not None:
            return self.gradients
        return self.compressed and mode != "dense"

    @property
    def script(self) -> Path:
        return FOLDER / self.file


ROWS = (
    Row("DDP", "ddp.py"),
    Row("DDP, no backend named", "ddp.py", backend=None),
    Row("DDP, names nccl", "ddp.py", arguments=("--backend", "nccl"), backend=None),
    Row("ImageNet-like", "imagenet.py", backend="--dist-backend", again=("--epochs=3", "--resume")),
    Row("nanoGPT-like", "nanogpt.py"),
    Row("minGPT-like", "mingpt.py", again=("--epochs=3",)),
    Row("torch.compile(DDP)", "compiled.py", arguments=("--compiler={compiler}",)),
    Row("DDP(torch.compile)", "compiled.py", arguments=("--compiler={compiler}", "--inside")),
    Row("distributed.checkpoint", "checkpoint.py", arguments=("--checkpoint={folder}/dcp",)),
    Row("Lightning", "lightning_fit.py", needs="lightning"),
    Row("Accelerate", "accelerate_loop.py", needs="accelerate"),
    Row("HF Trainer", "hf_trainer.py", needs="transformers"),
    Row("FSDP1", "fsdp1.py", compressed=False, says="hybrid sharding (HSDP)"),
    Row(
        "FSDP1, not sharded",
        "fsdp1.py",
        compressed=False,
        arguments=("--strategy=NO_SHARD",),
        says="2 replicas that are not sharded",
        gradients=True,
    ),
    Row(
        "FSDP2, torchtitan-like",
        "fsdp2.py",
        compressed=False,
        arguments=("--checkpoint={folder}/dcp",),
        again=("--steps=12",),
        says="hybrid sharding (HSDP)",
    ),
    Row(
        "FSDP1, hybrid",
        "fsdp1.py",
        arguments=("--strategy=HYBRID_SHARD", "--replicas=2"),
        ranks=4,
        says="weights mode (hybrid sharding",
    ),
    Row(
        "FSDP2, hybrid",
        "fsdp2.py",
        arguments=("--replicas=2",),
        ranks=4,
        says="weights mode (hybrid sharding",
    ),
    Row("DDP, two sites", "ddp.py", ranks=4, sites=2),
    Row(
        "FSDP1 over two sites",
        "fsdp1.py",
        ranks=4,
        sites=2,
        says="weights mode (hybrid sharding",
        gradients=False,
    ),
    Row(
        "FSDP2 over two sites",
        "fsdp2_example.py",
        ranks=4,
        sites=2,
        says="weights mode (hybrid sharding",
        gradients=False,
    ),
    Row("tensor parallel", "tensor_parallel.py", compressed=False),
    Row("pipeline", "pipeline.py", compressed=False),
)
