"""Tiny models and data, and the gradients of a trainer's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 64


def agree(found: Iterable[Mapping[str, Tensor]], expected: Iterable[Mapping[str, Tensor]], bound: float = 1e-6) -> None:
    """Per step, every parameter's gradient within ``bound`` of the largest."""
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert len(ours) > 0
        largest = max(float(gradient.abs().max()) for gradient in theirs.values())
        assert largest > 0
        for name, gradient in theirs.items():
            error = float((ours[name].double() - gradient.double()).abs().max())
            assert error <= bound * largest, f"{name}: {error / largest:.1e} of the largest gradient"


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def steps(
    model: torch.nn.Module, loss: Callable[[int], Tensor], n: int = 3, lr: float = 0.5
) -> list[dict[str, Tensor]]:
    """The gradients of ``n`` steps of gradient descent on ``loss(step)``."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    found = []
    for step in range(n):
        optimizer.zero_grad()
        loss(step).backward()
        found.append(gradients(model))
        optimizer.step()
    return found


def tiny_llama(
    seed: int, vocabulary: int = VOCABULARY, hidden: int = 16, dtype: torch.dtype = torch.float64, **config: Any
) -> Any:
    """float64, so that 1e-6 of the largest gradient is beyond the rounding of three steps."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**values | config)).to(dtype)


def token_rows(rows: int = 12, length: int = 10) -> list[dict[str, list[int]]]:
    """Rows of one length whose first tokens, ever more of them, have no label."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator).tolist()
    return [
        {
            "input_ids": row,
            "attention_mask": [1] * length,
            "labels": [-100] * (i % 5) + row[i % 5 :],
        }
        for i, row in enumerate(ids)
    ]


def recorded(trainer: Any) -> list[dict[str, Tensor]]:
    """``trainer.train()`` of a Hugging Face trainer: the gradients of each of its steps."""
    from transformers import TrainerCallback

    found: list[dict[str, Tensor]] = []

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            found.append(gradients(model))

    trainer.add_callback(Record())
    trainer.train()
    return found


def arguments(**options: Any) -> dict[str, Any]:
    """Of a Hugging Face trainer: three steps of gradient descent on a CPU, nothing written."""
    return {
        "output_dir": "out",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "seed": 0,
        "data_seed": 0,
    } | options
