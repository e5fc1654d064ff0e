"""Hugging Face Trainer: a small LLaVA learns from a larger one with a padded vocabulary.

    python examples/transformers_vision_language.py

Models are made from configurations and data are random: nothing is downloaded, nothing is learned that is worth it.
"""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, TrainingArguments

from mfd_fast.integrations.transformers import DistillTrainer

IMAGE_TOKEN, WORDS, PATCHES = 99, 100, 4


def llava(width: int, vocabulary: int) -> LlavaForConditionalGeneration:
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, initializer_range=0.2, **size)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **size)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def rows(n: int) -> list[dict[str, object]]:
    made = []
    for _ in range(n):
        words = torch.randint(0, IMAGE_TOKEN, (12,)).tolist()
        ids = [IMAGE_TOKEN] * PATCHES + words
        labels = [-100] * (PATCHES + 4) + words[4:]  # the answer alone
        row = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
        made.append(row | {"pixel_values": torch.randn(3, 8, 8)})
    return made


def main(steps: int = 20, output: str = "build/examples") -> list[float]:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DistillTrainer(
        llava(16, WORDS),
        arguments,
        train_dataset=rows(16),
        teacher_model=llava(32, WORDS + 28),
        distill={"temperature": 2.0, "soft_weight": 0.9, "hard_weight": 0.1},
        align_vocabulary=True,
    )
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    losses = [float(loss) for loss in main()]
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
