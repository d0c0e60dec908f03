"""One training of many participants in one process.

Each participant has weights, an optimizer state and batches of its own, as a rank has; their
tensors are stacked, and one forward and backward (torch.func.vmap) does the work of all. Only what
they exchange differs between methods.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import methods
import torch
from tasks import TASKS, Batch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from train_gpt import share_of_lr

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99)),
    "nadam": lambda groups, lr: torch.optim.NAdam(
        groups, lr=lr, betas=(0.9, 0.99), decoupled_weight_decay=True
    ),
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True),
    "signs": lambda groups, lr: torch.optim.SGD(groups, lr=lr),
}
"""Name -> optimizer; all work element by element, so that stacked weights have one each. `signs`:
what a method steps by that makes signs of gradients, whatever the others' optimizer is."""


@dataclass(frozen=True)
class Run:
    """Settings of one training; what identifies its line in the results.

    Attributes:
        batch: rows a participant and step. `dense` takes those of all in one step.
        task_settings, method_settings: arguments of the task and of the method.
        engine: `participants`, in one process, or `processes`: real ranks.
    """

    method: str
    engine: str = "participants"
    task: str = "chargpt"
    participants: int = 4
    steps: int = 600
    batch: int = 8
    lr: float = 1e-2
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    optimizer: str = "adamw"
    seed: int = 1
    evaluations: int = 10
    task_settings: dict[str, Any] = field(default_factory=dict)
    method_settings: dict[str, Any] = field(default_factory=dict)


def result_of(
    run: Run, parameters: int, bits: float, curve: list[dict[str, float]], seconds: float
) -> dict[str, Any]:
    """A line of the results; `bits`: what one participant has sent in all."""
    return {
        "run": asdict(run),
        "parameters": parameters,
        "bits_a_parameter_and_step": bits / parameters / run.steps,
        "against_bf16": 16 * parameters * run.steps / bits if bits else None,
        "final": curve[-1],
        "curve": curve,
        "seconds": seconds,
    }


def train(run: Run, device: str = "cpu") -> dict[str, Any]:
    """Train on this device; the settings, the losses and the bits sent."""
    if device != "cpu":
        # TF32 where there is such a thing: what trainings on a GPU use.
        torch.set_float32_matmul_precision("high")
        # vmap gives its gradient strides that it refuses.
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    return Training(run, torch.device(device)).result()


class Training:
    """The participants of one run, on one device."""

    def __init__(self, run: Run, device: torch.device) -> None:
        # torch says that it has no batched attention on CPUs; it is computed one by one.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        self.run, self.device = run, device
        self.task = TASKS[run.task](**run.task_settings)
        torch.manual_seed(run.seed)
        self.template = self.task.model().to(device)
        dense = run.method == "dense"
        self.n = 1 if dense else run.participants
        self.names = [name for name, _ in self.template.named_parameters()]
        self.weights = [
            weight.detach().expand(self.n, *weight.shape).clone().requires_grad_()
            for weight in self.template.parameters()
        ]
        # The quick start's: gains of norms and biases do not decay.
        decaying = [weight for weight in self.weights if weight.dim() > 2]
        others = [weight for weight in self.weights if weight.dim() <= 2]
        if dense:
            self.method: methods.Method = methods.Alone()
        else:
            self.method = methods.make(
                run.method, self.weights, run.method_settings, run.optimizer != "sgd"
            )
        self.optimizer = OPTIMIZERS["signs" if self.method.signs else run.optimizer](
            [
                {"params": decaying, "weight_decay": run.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            run.lr,
        )
        self.scheduler = LambdaLR(
            self.optimizer, lambda step: share_of_lr(step, run.warmup, run.steps)
        )
        self.generators = [
            torch.Generator().manual_seed(1000 * run.seed + i) for i in range(run.participants)
        ]
        self.validation = [self.placed(batch) for batch in self.task.validation()]

    def placed(self, batch: Batch) -> Batch:
        inputs, targets = (part.to(self.device, non_blocking=True) for part in batch)
        return inputs, targets

    def batches(self) -> Batch:
        """[n, rows, ...]: the next batch of each; of `dense`, all in one."""
        drawn = [self.task.draw(self.run.batch, generator) for generator in self.generators]
        inputs, targets = (
            torch.cat(part).unflatten(0, (self.n, -1)) for part in zip(*drawn, strict=True)
        )
        return self.placed((inputs, targets))

    def losses(self, weights: Sequence[Tensor], batch: Batch) -> Tensor:
        """[n]"""

        def one(own: Sequence[Tensor], inputs: Tensor, targets: Tensor) -> Any:  # noqa: ANN401
            named = dict(zip(self.names, own, strict=True))
            return functional_call(self.template, named, (inputs, targets))

        return vmap(one)(tuple(weights), *batch)

    def clip(self) -> None:
        """Each participant's gradient to its own norm."""
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        squares = torch.stack([g.view(self.n, -1).square().sum(1) for g in gradients])
        factor = (self.run.clip / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))

    def step(self) -> None:
        with torch.no_grad():
            self.method.sync(self.weights)
        self.losses(self.weights, self.batches()).sum().backward()
        with torch.no_grad():
            steps_now = self.method.reduce([w.grad for w in self.weights if w.grad is not None])
        if steps_now:
            if self.run.clip > 0 and not self.method.signs:
                self.clip()
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def judged(self, name: str, weights: Sequence[Tensor]) -> dict[str, float]:
        """Validation loss of one set of weights, and where the task classifies its accuracy."""
        own = dict(zip(self.names, weights, strict=True))
        total = right = rows = 0.0
        for inputs, targets in self.validation:
            if self.task.classifies:
                scores: Tensor = functional_call(self.template, own, (inputs,))
                loss = cross_entropy(scores, targets)
                right += (scores.argmax(1) == targets).sum().item()
            else:
                loss = functional_call(self.template, own, (inputs, targets))
            total += loss.item() * len(inputs)
            rows += len(inputs)
        found = {name: total / rows}
        if self.task.classifies:
            found[f"{name} accuracy"] = right / rows
        return found

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Of x (participant 0), of the mean of all, and of W."""
        found = self.judged("x", [weight[0] for weight in self.weights])
        if self.n > 1:
            found |= self.judged("mean", [weight.mean(0) for weight in self.weights])
            reference = self.method.reference(self.weights)
            if reference is not None:
                pairs = zip(reference, self.weights, strict=True)
                found |= self.judged("W", [w.to(x.device).view(x.shape[1:]) for w, x in pairs])
        return found

    def result(self) -> dict[str, Any]:
        run, begin = self.run, time.perf_counter()
        curve = []
        every = max(1, run.steps // run.evaluations)
        for step in range(1, run.steps + 1):
            self.step()
            if step % every == 0 or step == run.steps:
                curve.append({"step": step, **self.evaluate()})
        parameters = sum(weight[0].numel() for weight in self.weights)
        dense = run.method == "dense"
        bits = 32.0 * parameters * run.steps if dense else self.method.bits
        return result_of(run, parameters, bits, curve, time.perf_counter() - begin)
