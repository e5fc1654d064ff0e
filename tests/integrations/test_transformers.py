"""transformers.Trainer: three steps against the formula in plain PyTorch, and everything around it."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from trainer_steps import VOCABULARY, agree, arguments, recorded, tiny_llama, token_rows
from transformers import Trainer, TrainingArguments

import mfd_fast as mfd
from mfd_fast.integrations.transformers import DistillMixin, DistillTrainer

ROWS = token_rows()
OPTIONS = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.3}


class Bare(torch.nn.Module):
    """A language model without a configuration, whose forward takes the tokens alone and returns logits."""

    def __init__(self, seed):
        super().__init__()
        self.inner = tiny_llama(seed)

    def forward(self, input_ids):
        return self.inner(input_ids=input_ids).logits


def trainer(student, teacher=None, data=ROWS, kind=DistillTrainer, distill=OPTIONS, args=None, **options):
    args = TrainingArguments(**arguments(**args or {}))
    if teacher is not None:
        options["teacher_model"] = teacher
    return kind(student, args, train_dataset=data, distill=distill, **options)


def formula(student, teacher, labels, items, classes=None):
    """0.7·T²·KL + 0.3·CE of the next token, in eager PyTorch."""
    student, teacher, labels = student[:, :-1, :classes], teacher[:, :-1, :classes], labels[:, 1:]
    kept = labels != -100
    student, teacher, labels = student[kept], teacher[kept], labels[kept]
    soft = F.kl_div(F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1), reduction="sum", log_target=True)
    return (0.7 * 4 * soft + 0.3 * F.cross_entropy(student, labels, reduction="sum")) / items


class Eager(Trainer):
    """What a user would write."""

    teacher, classes = None, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            teacher = self.teacher(**inputs).logits
        return formula(outputs.logits, teacher, labels, num_items_in_batch, self.classes)


def eager(student, teacher, classes=None, data=ROWS, args=None):
    made = Eager(student, TrainingArguments(**arguments(**args or {})), train_dataset=data)
    made.teacher, made.classes = teacher.eval(), classes
    return made


def test_hf_trainer_steps():
    expected = recorded(eager(tiny_llama(0), tiny_llama(1, hidden=32)))
    agree(recorded(trainer(tiny_llama(0), tiny_llama(1, hidden=32))), expected)


def test_hf_trainer_accumulation():
    once = recorded(trainer(tiny_llama(0), tiny_llama(1)))
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    agree(recorded(trainer(tiny_llama(0), tiny_llama(1), args=halves)), once)


def _one_of_two(rank, port, file):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    args = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    found = recorded(trainer(tiny_llama(0), tiny_llama(1), args=args))
    assert dist.get_world_size() == 2
    if rank == 0:
        torch.save([{k.removeprefix("module."): v for k, v in step.items()} for step in found], file)
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    """Rows with different numbers of labels: the count is that of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, (port, tmp_path / "found.pt"), nprocs=2)
    agree(torch.load(tmp_path / "found.pt"), recorded(trainer(tiny_llama(0), tiny_llama(1))))


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_padded_vocabularies(padded):
    def models():
        return (
            tiny_llama(0, VOCABULARY + 7 * (padded == "student")),
            tiny_llama(1, VOCABULARY + 7 * (padded == "teacher")),
        )

    agree(recorded(trainer(*models(), align_vocabulary=True)), recorded(eager(*models(), classes=VOCABULARY)))
    with pytest.raises(ValueError, match="align_vocabulary=True"):
        trainer(*models()).train()


def test_transforms_are_kept_when_vocabularies_are_aligned():
    cap = {"student_transform": mfd.LogitTransform(softcap=5.0)}
    made = trainer(tiny_llama(0, VOCABULARY + 7), tiny_llama(1), distill=cap, align_vocabulary=True)
    assert made._aligned(VOCABULARY + 7, VOCABULARY) == {
        "student_transform": mfd.LogitTransform(softcap=5.0, classes=VOCABULARY),
        "teacher_transform": mfd.LogitTransform(classes=VOCABULARY),
    }


def llava(seed):
    """A LLaVA of 30 thousand parameters."""
    torch.manual_seed(seed)
    text = tiny_llama(seed).config
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=VOCABULARY - 1,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config).double()


def with_images():
    generator = torch.Generator().manual_seed(6)
    rows = []
    for row in token_rows():
        ids = [VOCABULARY - 1] * 4 + [t % (VOCABULARY - 1) for t in row["input_ids"]]
        pixels = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
        labels = [-100] * 4 + [t if t == -100 else t % (VOCABULARY - 1) for t in row["labels"]]
        rows.append({"input_ids": ids, "attention_mask": [1] * 14, "labels": labels, "pixel_values": pixels})
    return rows


def test_a_vision_language_model():
    data = with_images()
    agree(recorded(trainer(llava(0), llava(1), data)), recorded(eager(llava(0), llava(1), data=data)))


def test_a_text_student_of_a_vision_language_teacher_gets_no_pixels():
    """A teacher's forward that names its inputs gets those alone."""
    agree(recorded(trainer(tiny_llama(0), Bare(1))), recorded(trainer(tiny_llama(0), tiny_llama(1))))


def test_a_column_of_top_k():
    teacher, k = tiny_llama(1).eval(), 5
    rows = []
    with torch.no_grad():
        for row in ROWS:
            top = F.log_softmax(teacher(torch.tensor([row["input_ids"]])).logits[0], -1).topk(k)
            rows.append(row | {"top_values": top.values.tolist(), "top_indices": top.indices.tolist()})
    column = {"values": "top_values", "indices": "top_indices", "tail": "renormalize"}
    found = recorded(trainer(tiny_llama(0), data=rows, teacher_column=column, distill={"hard_weight": 0.5}))

    class Restricted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels, values, indices = (inputs.pop(name) for name in ("labels", "top_values", "top_indices"))
            logits = model(**inputs).logits[:, :-1]
            kept = labels[:, 1:] != -100
            student = logits.gather(-1, indices[:, :-1])[kept]
            teacher = F.log_softmax(values[:, :-1][kept], -1)
            soft = F.kl_div(F.log_softmax(student, -1), teacher, reduction="sum", log_target=True)
            return (
                soft + 0.5 * F.cross_entropy(logits[kept], labels[:, 1:][kept], reduction="sum")
            ) / num_items_in_batch

    args = TrainingArguments(**arguments(remove_unused_columns=False))
    agree(found, recorded(Restricted(tiny_llama(0), args, train_dataset=rows)))


def test_a_column_of_logits_or_of_topk_objects():
    teacher = tiny_llama(1).eval()
    with torch.no_grad():
        logits = [teacher(torch.tensor([row["input_ids"]])).logits[0] for row in ROWS]
    rows = [row | {"teacher": values.tolist()} for row, values in zip(ROWS, logits, strict=True)]
    expected = recorded(trainer(tiny_llama(0), tiny_llama(1)))
    agree(recorded(trainer(tiny_llama(0), data=rows, teacher_column="teacher")), expected)

    def collate(features):
        batch = transformers.default_data_collator([{k: v for k, v in f.items() if k != "teacher"} for f in features])
        top = torch.tensor([f["teacher"] for f in features]).topk(VOCABULARY)
        return batch | {"teacher": mfd.TopK(top.values, top.indices, values_are="logits", tail="renormalize")}

    made = trainer(tiny_llama(0), data=rows, teacher_column="teacher", data_collator=collate)
    agree(recorded(made), expected)


def test_columns_of_padded_lists():
    """Lists of 3 and 5 tokens, padded by -1 to 5, are those of lists whose other tokens have no mass."""
    teacher = tiny_llama(1).eval()
    rows, known = [], []
    for row in ROWS:
        with torch.no_grad():
            top = teacher(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1).topk(5)
        mask = torch.arange(5) < (3 + 2 * (torch.arange(len(top.values)) % 2))[:, None]
        values, indices = top.values.masked_fill(~mask, -1e4), top.indices.masked_fill(~mask, -1)
        rows.append(row | {"v": values.tolist(), "i": indices.tolist(), "m": mask.tolist()})
        known.append(row | {"v": values.tolist(), "i": top.indices.tolist()})
    column = {"values": "v", "indices": "i", "mask": "m", "tail": "zero"}
    found = recorded(trainer(tiny_llama(0), data=rows, teacher_column=column))
    without = {name: value for name, value in column.items() if name != "mask"}
    agree(found, recorded(trainer(tiny_llama(0), data=known, teacher_column=without)))


@pytest.mark.parametrize("shift", [True, False])
def test_labels_are_counted_as_they_are_shifted(shift):
    """Unasked the Trainer counts a bare module's labels as they lie and leaves out a causal model's first."""
    moved = [row | {"labels": row["labels"][1:] + [-100]} for row in ROWS]
    data, student = (ROWS, Bare(0)) if shift else (moved, tiny_llama(0))
    for args in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        made = trainer(student, tiny_llama(1), data, shift=shift, args={"label_names": ["labels"]} | args)
        found = [{name.removeprefix("inner."): g for name, g in step.items()} for step in recorded(made)]
        agree(found, recorded(trainer(tiny_llama(0), tiny_llama(1))))
        student = Bare(0) if shift else tiny_llama(0)


class Plain(torch.nn.Module):
    """A classifier without a configuration, whose forward takes no **kwargs and no labels."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, input_ids):
        return {"logits": self.head(self.embed(input_ids).mean(1))}


class Pretrained(transformers.PreTrainedModel):
    config_class = transformers.LlamaConfig

    def __init__(self):
        super().__init__(transformers.LlamaConfig(initializer_range=0.5))
        self.inner = Plain()
        self.post_init()

    def forward(self, input_ids):
        return self.inner(input_ids)


@pytest.mark.parametrize("kind", [Plain, Pretrained])
def test_a_model_without_kwargs(kind):
    def plain(seed):
        torch.manual_seed(seed)
        return kind().double()

    rows = [{"input_ids": row["input_ids"], "labels": i % 5 if i % 4 else -100} for i, row in enumerate(ROWS)]

    class EagerPlain(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            student = model(inputs["input_ids"])["logits"]
            with torch.no_grad():
                teacher = self.teacher(inputs["input_ids"])["logits"]
            kept = inputs["labels"] != -100
            soft = F.kl_div(
                F.log_softmax(student / 2, -1)[kept],
                F.log_softmax(teacher / 2, -1)[kept],
                reduction="sum",
                log_target=True,
            )
            hard = F.cross_entropy(student[kept], inputs["labels"][kept], reduction="sum")
            return (0.7 * 4 * soft + 0.3 * hard) / kept.sum()

    theirs = EagerPlain(
        plain(0),
        TrainingArguments(**arguments(label_names=["labels"], remove_unused_columns=False)),
        train_dataset=rows,
    )
    theirs.teacher = plain(1)
    args = {"label_names": ["labels"]}
    once = recorded(trainer(plain(0), plain(1), rows, args=args))
    agree(once, recorded(theirs))
    halves = args | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    agree(recorded(trainer(plain(0), plain(1), rows, args=halves)), once)


def test_an_encoder_decoder_gets_its_labels():
    def t5(seed):
        torch.manual_seed(seed)
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=VOCABULARY,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=1,
                num_heads=2,
                decoder_start_token_id=0,
                dropout_rate=0.0,
            )
        ).double()

    class EagerT5(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with torch.no_grad():
                teacher = self.teacher(**inputs).logits
            kept = inputs["labels"] != -100
            student = model(**inputs).logits
            soft = F.kl_div(
                F.log_softmax(student[kept], -1), F.log_softmax(teacher[kept], -1), reduction="sum", log_target=True
            )
            return soft / num_items_in_batch

    theirs = EagerT5(t5(0), TrainingArguments(**arguments()), train_dataset=ROWS)
    theirs.teacher = t5(1).eval()
    agree(recorded(trainer(t5(0), t5(1), distill={})), recorded(theirs))


def test_without_labels_padding_does_not_count():
    rows = [{"input_ids": row["input_ids"], "attention_mask": [1] * 7 + [0] * 3} for row in ROWS]
    made = trainer(tiny_llama(0), tiny_llama(1), rows, distill={})
    batch = {k: torch.tensor([row[k] for row in rows[:4]]) for k in rows[0]}
    loss, outputs = made.compute_loss(made.model, batch, return_outputs=True)
    with torch.no_grad():
        teacher = tiny_llama(1)(**batch).logits
    torch.testing.assert_close(loss, mfd.distill_loss(outputs.logits[:, :7], teacher[:, :7]))
    assert set(batch) == {"input_ids", "attention_mask"}


def test_hf_trainer_evaluation():
    made = trainer(tiny_llama(0), tiny_llama(1), eval_dataset=ROWS[:4], args={"per_device_eval_batch_size": 4})
    found = made.evaluate()["eval_loss"]
    batch = {k: torch.tensor([row[k] for row in ROWS[:4]]) for k in ROWS[0]}
    labels = batch.pop("labels")
    with torch.no_grad():
        loss = formula(
            tiny_llama(0)(**batch).logits, tiny_llama(1)(**batch).logits, labels, (labels[:, 1:] != -100).sum()
        )
    assert found == pytest.approx(loss.item(), rel=1e-6)


def test_autocast_keeps_the_digits_of_the_loss():
    models = (tiny_llama(seed, dtype=torch.float32) for seed in (0, 1))
    made = trainer(*models, args={"bf16": True})
    batch = {k: torch.tensor([row[k] for row in ROWS[:4]]) for k in ROWS[0]}
    kept = {}
    with made.accelerator.autocast():
        student = made.model
        loss, outputs = made.compute_loss(student, batch, return_outputs=True)
        with torch.no_grad():
            kept["teacher"] = made.teacher_model(batch["input_ids"], batch["attention_mask"]).logits
    assert outputs.logits.dtype == torch.bfloat16
    labels = batch["labels"]
    exact = formula(outputs.logits.double(), kept["teacher"].double(), labels, (labels[:, 1:] != -100).sum())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_the_teacher_is_frozen_and_not_saved(tmp_path):
    teacher = tiny_llama(1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    made = trainer(tiny_llama(0), teacher)
    made.train()
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    made.save_model(str(tmp_path / "student"))
    restored = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "student")
    assert restored.state_dict().keys() == made.model.state_dict().keys()


def test_label_smoothing_is_the_trainers():
    made = trainer(tiny_llama(0), tiny_llama(1), args={"label_smoothing_factor": 0.1})
    assert made.distill["label_smoothing"] == 0.1


def test_a_mixin_of_another_trainer():
    class Mine(DistillMixin, transformers.Seq2SeqTrainer):
        pass

    args = transformers.Seq2SeqTrainingArguments(**arguments())
    made = Mine(tiny_llama(0), args, train_dataset=ROWS, teacher_model=tiny_llama(1), distill=OPTIONS)
    agree(recorded(made), recorded(trainer(tiny_llama(0), tiny_llama(1))))


def test_hf_trainer_errors():
    student, teacher = tiny_llama(0), tiny_llama(1)
    with pytest.raises(ValueError, match="exactly one of teacher_model and teacher_column must be given, got neither"):
        trainer(student)
    with pytest.raises(ValueError, match="got both"):
        trainer(student, teacher, teacher_column="teacher")
    with pytest.raises(ValueError, match="compute_loss_func"):
        trainer(student, teacher, compute_loss_func=lambda *_: None)
    with pytest.raises(ValueError, match="keyword arguments of distill_loss, got heat, reduction"):
        trainer(student, teacher, distill={"heat": 2, "reduction": "sum"})
    # The trainer needs one scalar of whole logits, and counts labels that are not -100.
    for name in ("return_parts", "process_group", "ignore_index"):
        with pytest.raises(ValueError, match=f"keyword arguments of distill_loss, got {name}"):
            trainer(student, teacher, distill={name: True})
    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    with pytest.raises(ValueError, match="hard_weight needs labels"):
        trainer(student, teacher, rows).train()
    with pytest.raises(ValueError, match="teacher_column top, tops is not in the batch, which has input_ids"):
        trainer(student, data=rows, teacher_column={"values": "top", "indices": "tops"}).train()
    top = mfd.TopK(torch.zeros(1, 2), torch.tensor([[3, VOCABULARY]]))
    with pytest.raises(ValueError, match=rf"lists class {VOCABULARY} .* TopK\(mask=indices < {VOCABULARY}\) leaves"):
        trainer(student, teacher, align_vocabulary=True)._check_listed(top, VOCABULARY)
