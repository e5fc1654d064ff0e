"""TRL: its functions and trainers, three steps, theirs and ours."""

import random

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from trainer_steps import VOCABULARY, agree, arguments, recorded, tiny_llama, token_rows
from trl import DistillationConfig
from trl import DistillationTrainer as TheirDistillationTrainer
from trl.experimental.gkd import GKDConfig
from trl.experimental.gkd import GKDTrainer as TheirGKDTrainer
from trl.experimental.gold import GOLDConfig
from trl.experimental.gold import GOLDTrainer as TheirGOLDTrainer
from trl.trainer import distillation_trainer

from mfd_fast.integrations import trl as ours
from mfd_fast.problems import linear

THEIRS = distillation_trainer._chunked_divergence_loss
BETAS = [0.0, 0.5, 1.0]


def compare(call, leaves, *functions, bound=1e-6):
    """Every result and gradient of two functions of the same arguments."""
    results = []
    for function in functions:
        out = call(function)
        out = out if isinstance(out, tuple) else (out,)
        results.append((out, torch.autograd.grad(out[0], leaves, allow_unused=True)))
    (first, gradients), (second, expected) = results
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
        assert not a.requires_grad or a is first[0]
    largest = max(float(g.abs().max()) for g in expected)
    for a, b in zip(gradients, expected, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).abs().max()) <= bound * largest
    return first


def states(rows=(3, 7), vocabulary=40, student=8, teacher=12, bias=True):
    made = {
        "student_hidden_states": torch.randn(*rows, student, requires_grad=True),
        "teacher_hidden_states": torch.randn(*rows, teacher),
        "student_lm_head_weight": (0.3 * torch.randn(vocabulary, student)).requires_grad_(),
        "teacher_lm_head_weight": 0.3 * torch.randn(vocabulary, teacher),
        "completion_mask": (torch.rand(rows) < 0.7).int(),
    }
    if bias:
        made["student_lm_head_bias"] = torch.randn(vocabulary).requires_grad_()
        made["teacher_lm_head_bias"] = torch.randn(vocabulary)
    return made


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": torch.tensor(31)},
        {"num_items_in_batch": 5, "temperature": 0.7},
        {"student_logit_scale": 0.5, "teacher_logit_scale": 2.0, "temperature": 1.5},
        {"student_final_logit_softcapping": 3.0, "teacher_final_logit_softcapping": 5.0, "student_logit_scale": 2.0},
    ],
    ids=["plain", "items", "number", "scale", "softcap"],
)
@pytest.mark.parametrize("chunk_rows", [256, 3])
def test_trl_chunked_divergence(monkeypatch, beta, options, chunk_rows):
    monkeypatch.setattr(linear, "default_chunk_rows", lambda *_: chunk_rows)
    values = states()
    leaves = [v for v in values.values() if v.requires_grad]
    _, entropy, count = compare(
        lambda f: f(**values, beta=beta, **options), leaves, ours.chunked_divergence_loss, THEIRS
    )
    assert entropy > 0
    assert count == values["completion_mask"].sum()


@pytest.mark.parametrize("beta", BETAS)
def test_trl_chunked_divergence_of_nothing(beta):
    values = states() | {"completion_mask": torch.zeros(3, 7)}
    leaves = [v for v in values.values() if v.requires_grad]
    loss, entropy, count = ours.chunked_divergence_loss(**values, beta=beta)
    assert (loss, entropy, count) == (0, 0, 0)
    assert not any(g.any() for g in torch.autograd.grad(loss, leaves))


def test_trl_chunked_divergence_makes_only_the_gradients_that_are_needed():
    values = states()
    for name in ("student_lm_head_weight", "student_lm_head_bias"):  # LoRA: the head is frozen
        values[name] = values[name].detach()
    compare(lambda f: f(**values, beta=0.5), [values["student_hidden_states"]], ours.chunked_divergence_loss, THEIRS)
    with torch.no_grad():
        assert not ours.chunked_divergence_loss(**values, beta=0.5)[0].requires_grad


@pytest.mark.parametrize("beta", BETAS)
def test_trl_chunked_divergence_of_bfloat16(beta):
    values = {n: v if n == "completion_mask" else v.detach().bfloat16() for n, v in states().items()}
    exact = {n: v.double() for n, v in values.items()}
    leaf, exact_leaf = values["student_hidden_states"].requires_grad_(), exact["student_hidden_states"].requires_grad_()
    expected = ours.chunked_divergence_loss(**exact, beta=beta)
    (gradient,) = torch.autograd.grad(expected[0], exact_leaf)

    def error(function):
        loss = function(**values, beta=beta)[0]
        (found,) = torch.autograd.grad(loss, leaf)
        assert found.dtype == torch.bfloat16
        return float((found.double() - gradient).abs().max() / gradient.abs().max())

    # The logits of a bfloat16 head: 8 bits.
    assert error(ours.chunked_divergence_loss) <= 2**-6


def random_logits(dtype=torch.float64):
    labels = torch.randint(0, 20, (4, 6))
    labels[0, :3] = labels[2] = -100
    return torch.randn(4, 6, 20, dtype=dtype, requires_grad=True), torch.randn(4, 6, 20, dtype=dtype), labels


@pytest.mark.parametrize("beta", [*BETAS, 0.1])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(9)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("labelled", [True, False])
def test_trl_generalized_jsd(beta, reduction, items, labelled):
    student, teacher, labels = random_logits()
    if reduction == "none" and items is None:
        found = ours.GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, reduction="none")
        torch.testing.assert_close(
            found, TheirGKDTrainer.generalized_jsd_loss(student, teacher, labels, beta, reduction="none")
        )
        return
    for mine, theirs in ((ours.GKDTrainer, TheirGKDTrainer), (ours.GOLDTrainer, TheirGOLDTrainer)):
        compare(
            lambda f: f(
                student,
                teacher,
                labels=labels if labelled else None,
                beta=beta,
                temperature=1.7,
                reduction=reduction,
                num_items_in_batch=items,
            ),
            [student],
            mine.generalized_jsd_loss,
            theirs.generalized_jsd_loss,
        )


def test_trl_generalized_jsd_of_nothing():
    student, teacher, labels = random_logits()
    loss = ours.GKDTrainer.generalized_jsd_loss(student, teacher, torch.full_like(labels, -100))
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


def test_trl_probabilities_of_matched_tokens_stay_its_own():
    student, teacher = torch.rand(5, 9, requires_grad=True), torch.rand(5, 9)
    compare(
        lambda f: f(student, teacher, logits_are_probs=True),
        [student],
        ours.GOLDTrainer.generalized_jsd_loss,
        TheirGOLDTrainer.generalized_jsd_loss,
    )


def test_trl_bfloat16_logits_keep_the_digits_of_the_loss():
    """TRL computes the loss of bfloat16 logits in bfloat16."""
    student, teacher, labels = random_logits(torch.bfloat16)
    exact = TheirGKDTrainer.generalized_jsd_loss(student.double(), teacher.double(), labels).item()
    assert ours.GKDTrainer.generalized_jsd_loss(student, teacher, labels).item() == pytest.approx(exact, rel=1e-6)
    assert TheirGKDTrainer.generalized_jsd_loss(student, teacher, labels).item() != pytest.approx(exact, rel=1e-4)


# --------------------------------------------------------------------------------------------------- trainers


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def gkd(kind, student=None, lmbda=0.0, beta=0.5, temperature=0.9, options=None, **args):
    random.seed(0)
    rows = [row | {"prompts": row["input_ids"][:4], "prompt_attention_mask": [1] * 4} for row in token_rows()]
    config = GKDConfig(
        **arguments(lmbda=lmbda, beta=beta, temperature=temperature, max_new_tokens=6, max_length=64, **args)
    )
    return kind(
        student or tiny_llama(0),
        teacher_model=tiny_llama(1, hidden=32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        data_collator=transformers.default_data_collator,
        processing_class=tokenizer(),
        **options or {},
    )


@pytest.mark.parametrize("beta", BETAS)
def test_gkd_steps(beta):
    agree(recorded(gkd(ours.GKDTrainer, beta=beta)), recorded(gkd(TheirGKDTrainer, beta=beta)))


def test_gkd_steps_on_its_own_tokens():
    agree(recorded(gkd(ours.GKDTrainer, lmbda=1.0)), recorded(gkd(TheirGKDTrainer, lmbda=1.0)))


def test_gkd_accumulation():
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    agree(recorded(gkd(ours.GKDTrainer, **halves)), recorded(gkd(ours.GKDTrainer)))


def test_gkd_evaluation():
    found, expected = (gkd(kind).evaluate()["eval_loss"] for kind in (ours.GKDTrainer, TheirGKDTrainer))
    assert found == pytest.approx(expected, rel=1e-6)


def test_gkd_lora():
    from peft import LoraConfig, get_peft_model

    def student():
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(tiny_llama(0), config)

    found = recorded(gkd(ours.GKDTrainer, student()))
    assert all("lora" in name for name in found[0])
    agree(found, recorded(gkd(TheirGKDTrainer, student())))


def test_gkd_with_its_temperature():
    """TRL generates at it and trains at 1: an option, off."""
    made = gkd(ours.GKDTrainer, temperature=3.0, options={"apply_temperature": True})
    batch = next(iter(made.get_train_dataloader()))
    logits = [model(batch["input_ids"]).logits[:, :-1] for model in (made.model, made.teacher_model)]
    labels = batch["labels"][:, 1:]
    for trainer, temperature in ((made, 3.0), (gkd(ours.GKDTrainer, temperature=3.0), 1.0)):
        expected = TheirGKDTrainer.generalized_jsd_loss(*logits, labels, 0.5, temperature)
        torch.testing.assert_close(trainer.compute_loss(made.model, dict(batch)), expected)


COUNTED = {"count_generated_tokens": True}


@pytest.mark.parametrize("options", [{}, COUNTED], ids=["theirs", "counted"])
def test_gkd_counts_what_it_generated(options):
    """On its own tokens TRL divides by the number of the data set's labels: an option, off."""
    made = gkd(ours.GKDTrainer, lmbda=1.0, options=options)
    made.current_gradient_accumulation_steps = 2
    batch = dict(next(iter(made.get_train_dataloader())))
    loss = made.training_step(made.model, batch, num_items_in_batch=1000)  # leaves what it generated in the batch
    inputs = batch["input_ids"], batch["attention_mask"]
    logits = [model(*inputs).logits[:, :-1].detach() for model in (made.model, made.teacher_model)]
    labels = batch["labels"][:, 1:]
    divisor = 2 * (labels != -100).sum() if options else 1000
    total = TheirGKDTrainer.generalized_jsd_loss(*logits, labels, 0.5, reduction="sum")
    torch.testing.assert_close(loss, total / divisor)


@pytest.mark.parametrize("lmbda", [0.0, 1.0], ids=["data", "own_tokens"])
def test_gkd_counts_accumulate(lmbda):
    """Rows of the data set keep the Trainer's count. Own tokens: greedy and without an end, as many in each half."""

    def found(**args):
        made = gkd(ours.GKDTrainer, lmbda=lmbda, temperature=1e-3, options=COUNTED, **args)
        made.generation_config.eos_token_id = made.model.generation_config.eos_token_id = None
        return recorded(made)

    agree(found(per_device_train_batch_size=2, gradient_accumulation_steps=2), found())
    if lmbda == 0:
        agree(found(), recorded(gkd(TheirGKDTrainer)))


@pytest.mark.parametrize("kind", [ours.GKDTrainer, ours.GOLDTrainer])
def test_trl_vocabularies_that_differ(kind):
    with pytest.raises(ValueError, match="teacher must have as many classes as student, got 9 and 7"):
        kind.generalized_jsd_loss(torch.randn(2, 3, 7), torch.randn(2, 3, 9))


def gold(kind, lmbda=0.0, **args):
    random.seed(0)
    torch.manual_seed(0)
    rows = [row | {"prompts": row["input_ids"][:4], "prompt_attention_mask": [1] * 4} for row in token_rows()]
    config = GOLDConfig(
        **arguments(lmbda=lmbda, max_completion_length=6, max_length=64, remove_unused_columns=False, **args),
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return kind(
        tiny_llama(0),
        teacher_model=tiny_llama(1, hidden=32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        data_collator=transformers.default_data_collator,
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("lmbda", [0.0, 1.0], ids=["data", "own_tokens"])
def test_gold_steps(lmbda):
    agree(recorded(gold(ours.GOLDTrainer, lmbda)), recorded(gold(TheirGOLDTrainer, lmbda)))


def test_gold_accumulation():
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    found = recorded(gold(ours.GOLDTrainer, **halves))
    agree(found, recorded(gold(TheirGOLDTrainer, **halves)))
    # TRL's dataloader repeats the whole batch for each micro-batch, and the Trainer counts the labels of both.
    doubled = [{name: 2 * gradient for name, gradient in step.items()} for step in found[:1]]
    agree(doubled, recorded(gold(TheirGOLDTrainer))[:1])


#: TRL projects hidden states in float32: logits near 1 keep its rounding below 1e-6 of the largest gradient.
SMALL = {"initializer_range": 0.2}
KINDS = (ours.DistillationTrainer, TheirDistillationTrainer)


def run(make, *values, **options):
    """The gradients and the log of a trainer that generates from one seed."""
    torch.manual_seed(7)
    made = make(*values, **options)
    return recorded(made), made.state.log_history


def distillation(kind, student=None, teacher=None, data=None, processor=None, beta=1.0, **args):
    random.seed(0)
    np.random.seed(0)
    prompts = [{"prompt": " ".join(f"w{3 + (7 * i + j) % 50}" for j in range(4))} for i in range(12)]
    config = DistillationConfig(**arguments(beta=beta, max_completion_length=6, logging_steps=1, **args))
    return kind(
        student or tiny_llama(0, **SMALL),
        teacher_model=teacher or tiny_llama(1, hidden=32, **SMALL),
        args=config,
        train_dataset=data or Dataset.from_list(prompts),
        eval_dataset=data or Dataset.from_list(prompts[:4]),
        processing_class=processor or tokenizer(),
    )


@pytest.mark.parametrize("beta", BETAS)
def test_trl_distillation_steps(beta):
    (found, log), (expected, their_log) = (run(distillation, kind, beta=beta) for kind in KINDS)
    agree(found, expected)
    for name in ("entropy", "loss"):
        values, theirs = ([entry[name] for entry in entries if name in entry] for entries in (log, their_log))
        assert len(values) > 0
        assert values == pytest.approx(theirs, rel=1e-5)


def test_trl_distillation_lora():
    from peft import LoraConfig, get_peft_model

    def student():
        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(tiny_llama(0, **SMALL), config)

    (found, _), (expected, _) = (run(distillation, kind, student()) for kind in KINDS)
    assert all("lora" in name for name in found[0])
    agree(found, expected)


def test_trl_distillation_accumulation():
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    (found, _), (expected, _) = (run(distillation, kind, **halves) for kind in KINDS)
    agree(found, expected)
    agree(found, run(distillation, ours.DistillationTrainer)[0])


def test_trl_distillation_evaluation():
    found, expected = (distillation(kind, per_device_eval_batch_size=4).evaluate() for kind in KINDS)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def vision_processor():
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.image_token = "<image>"
    words.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    size = {"height": 8, "width": 8}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size)
    return transformers.LlavaProcessor(
        images,
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )


def tiny_llava(seed):
    torch.manual_seed(seed)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=tiny_llama(seed, VOCABULARY + 1, **SMALL).config,
        image_token_index=VOCABULARY,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config).double()


def test_trl_distillation_of_a_vision_language_model():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3), dtype=np.uint8)
    rows = [
        {"prompt": [{"role": "user", "content": f"w{3 + i} w9"}], "image": Image.fromarray(image)}
        for i, image in enumerate(pixels)
    ]
    data = Dataset.from_list(rows)
    found, expected = (
        run(distillation, kind, tiny_llava(0), tiny_llava(1), data, vision_processor(), beta=0.5)[0] for kind in KINDS
    )
    agree(found, expected)


def test_use_mfd_in_trl():
    before = (
        distillation_trainer._chunked_divergence_loss,
        vars(TheirGKDTrainer)["generalized_jsd_loss"],
        vars(TheirGOLDTrainer)["generalized_jsd_loss"],
    )
    with ours.use_mfd():
        assert distillation_trainer._chunked_divergence_loss is ours.chunked_divergence_loss
        assert TheirGKDTrainer.generalized_jsd_loss is ours.GKDTrainer.generalized_jsd_loss
        assert TheirGOLDTrainer.generalized_jsd_loss is ours.GOLDTrainer.generalized_jsd_loss
        found = recorded(gkd(TheirGKDTrainer))
        recorded(distillation(ours.DistillationTrainer, max_steps=1))
        with pytest.raises(RuntimeError, match="does not nest"):
            ours.use_mfd().__enter__()
    agree(found, recorded(gkd(ours.GKDTrainer)))
    with pytest.raises(KeyError), ours.use_mfd():
        raise KeyError
    assert before == (
        distillation_trainer._chunked_divergence_loss,
        vars(TheirGKDTrainer)["generalized_jsd_loss"],
        vars(TheirGOLDTrainer)["generalized_jsd_loss"],
    )
