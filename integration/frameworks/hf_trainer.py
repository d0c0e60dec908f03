"""A GPT-2, small and with random weights, trained by the Trainer of transformers.

On CPUs the Trainer, by Accelerate, knows gloo and MPI only; it takes a group that is there already.

torchrun --standalone --nproc-per-node=2 hf_trainer.py --backend distro
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class Rising(Dataset[dict[str, Tensor]]):
    """Sequences in which each token is the one before plus one."""

    def __init__(self, size: int) -> None:
        starts = torch.randint(64, (size, 1), generator=torch.Generator().manual_seed(1))
        self.rows = (starts + torch.arange(16)) % 64

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class PrintLoss(TrainerCallback):
    """Prints what the trainer logs."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            print(f"step {state.global_step}: loss {float(logs['loss']):.9g}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="nccl")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save")
    args = parser.parse_args()

    torch.distributed.init_process_group(args.backend)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            use_cpu=True,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)
        model = GPT2LMHeadModel(config)
        trainer = Trainer(model, settings, train_dataset=Rising(512), callbacks=[PrintLoss()])
        trainer.train()
        if args.save and trainer.is_world_process_zero():
            torch.save(model.state_dict(), args.save)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
