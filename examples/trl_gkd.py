"""TRL: generalized knowledge distillation (GKD) of a tiny language model, half of it on its own generations.

    python examples/trl_gkd.py

Models and tokenizer are made here: nothing is downloaded.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig

from mfd_fast.integrations.trl import GKDTrainer

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "user", "assistant", *(f"w{i}" for i in range(59))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def llama(width: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def conversations(n: int) -> Dataset:
    def say(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(f"w{i}" for i in torch.randint(0, 59, (6,)).tolist())}

    return Dataset.from_list([{"messages": [say("user"), say("assistant")]} for _ in range(n)])


def main(steps: int = 20, output: str = "build/examples") -> list[float]:
    torch.manual_seed(0)
    arguments = GKDConfig(
        output,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        lmbda=0.5,
        beta=0.5,
        temperature=1.0,
        max_new_tokens=8,
        max_length=64,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
    )
    trainer = GKDTrainer(
        llama(16),
        teacher_model=llama(32),
        args=arguments,
        train_dataset=conversations(16),
        processing_class=tokenizer(),
        count_generated_tokens=True,
    )
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    losses = [float(loss) for loss in main()]
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
