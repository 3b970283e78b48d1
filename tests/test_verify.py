"""`simla verify`: a recorded step agrees, every known misreading of it does not, and recordings of other sizes do."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from simla_ds import task as task_module
from simla_ds.model.heads import HeadLoss, LanguageHead
from simla_ds.model.simla import Simla
from simla_ds.model.stream import Embeddings, FeedForward
from simla_ds.objectives.feature_queue import FeatureQueue
from simla_ds.objectives.mlm import MaskedLanguageModelling
from simla_ds.objectives.psl import PseudoLabelledKeywords
from simla_ds.objectives.soft_targets import distilled
from simla_ds.objectives.xmm import CrossModalReconstruction
from simla_ds.passes import FastPasses
from simla_ds.task import PretrainTask
from simla_ds.teacher import Teacher
from simla_ds.verify import verify_reference
from tests import reference_step

Patch = pytest.MonkeyPatch


def compare(folder: Path, tmp_path: Path, **options: Any) -> tuple[bool, dict[str, dict[str, Any]]]:
    """Verify a recording; return the verdict and each comparison by tensor name (of the last run)."""
    out = tmp_path / "comparison.json"
    verdict = verify_reference(folder, json_out=out, **options)
    return verdict, {row["name"]: row for row in json.loads(out.read_text())}


@pytest.mark.parametrize("passes", ["fast", "plain"])
def test_the_recorded_step_verifies(passes: str, recorded_step: Path, tmp_path: Path):
    verdict, rows = compare(recorded_step, tmp_path, passes=passes)
    assert verdict
    assert len(rows) == 68
    recorded = [n for n in load_file(recorded_step / "expected.safetensors") if not n.startswith("loss64.")]
    assert sorted(rows) == sorted(recorded)
    assert {row["limit"] for name, row in rows.items() if name.startswith("loss.")} == {1e-5}


def test_the_independent_reference_agrees_with_the_recorded_step(recorded_step: Path):
    """Whatever the generated recordings below are worth rests on this."""
    config = json.loads((recorded_step / "config.json").read_text())
    weights, inputs, expected = (
        load_file(recorded_step / f"{name}.safetensors") for name in ("weights", "inputs", "expected")
    )
    assert reference_step.student_names(weights) == config["grad_norm_names"]
    result = reference_step.step(weights, inputs, config, alpha=0.4)
    actual = {f"{group}.{name}": t.detach() for group in result for name, t in result[group].items()}
    actual["grad_norms_all"] = torch.stack([result["grad"][n].norm() for n in config["grad_norm_names"]])
    for name, wanted in expected.items():
        mine, wanted = actual[name.replace("loss64.", "loss.")].double(), wanted.double()
        limit = 1e-7 if name.startswith("loss64.") else 2e-6  # the recording's own float32 noise; 1.3e-6 measured
        assert (mine - wanted).abs().max() <= limit * wanted.abs().max(), name


# --- mutations: the misreadings of REFERENCE_STEP section 5, each applied to the classes that train -----------------


def replace_requests(patch: Patch, objective: type, change: Callable[..., dict[str, Any]]) -> None:
    """Change fields of an objective's requests; `change(self, request, batch, features)` returns the new values."""
    original = objective.requests

    def requests(self: Any, batch: Any, features: Any) -> list[Any]:
        asked = original(self, batch, features)
        return [dataclasses.replace(r, **change(self, r, batch, features)) for r in asked]

    patch.setattr(objective, "requests", requests)


def mlm_distillation_over_words(patch: Patch) -> None:
    def over_words(self: Any, batch: Any, hidden: Tensor, alpha: float) -> HeadLoss:
        sums = distilled(self.networks.teacher.language_head.decoder, hidden, batch["labels"], alpha)
        return lambda rows, weight, bias: sums(rows.flatten(0, 1)[batch["label_index"]], weight, bias)

    patch.setattr(MaskedLanguageModelling, "_over_positions", over_words)


def teacher_xmm_uses_the_teachers_embeddings(patch: Patch) -> None:
    replace_requests(
        patch,
        CrossModalReconstruction,
        lambda self, r, batch, f: {"text_keys": f.teacher.text_embeddings} if r.by == "teacher" else {},
    )


def xmm_attends_to_encoded_text(patch: Patch) -> None:
    features = FastPasses.features
    patch.setattr(FastPasses, "features", lambda *a, **named: features(*a, **{**named, "every_text_token": True}))
    replace_requests(
        patch, CrossModalReconstruction, lambda self, r, batch, f: {"text_keys": getattr(f, r.by).text_tokens}
    )


def xmm_ignores_caption_padding(patch: Patch) -> None:
    replace_requests(
        patch,
        CrossModalReconstruction,
        lambda self, r, batch, f: {"text_mask": torch.ones_like(r.text_mask), "token_index": None},
    )


def no_text_positions_on_the_image_stream(patch: Patch) -> None:
    patch.setattr(Embeddings, "_image_positions", lambda self, length: 0)


def no_layer_norm_on_the_image_stream(patch: Patch) -> None:
    original = Embeddings.forward

    def forward(self: Any, rows: Tensor, *positions: Tensor) -> Tensor:
        if rows.is_floating_point():
            return rows + self._image_positions(rows.shape[1])
        return original(self, rows, *positions)

    patch.setattr(Embeddings, "forward", forward)


def no_ema_before_the_forward(patch: Patch) -> None:
    """Run it after the forward instead, so that what is recorded of the teacher afterwards is still right."""
    update, forward, waiting = Teacher.update, PretrainTask.forward, []
    patch.setattr(Teacher, "update", lambda self, momentum: waiting.append(momentum))

    def late(self: Any, *arguments: Any, **named: Any) -> dict[str, Any]:
        result = forward(self, *arguments, **named)
        update(self.teacher, waiting.pop())
        return result

    patch.setattr(PretrainTask, "forward", late)


def queue_updated_before_ita(patch: Patch) -> None:
    original, push = task_module.contrast_keys, FeatureQueue.push

    def contrast_keys(teacher: Any, batch: Any, temperature: Tensor, queue: Any, **named: Any) -> Any:
        push(queue, teacher.image_feature, teacher.text_feature, batch["image_id"])
        return original(teacher, batch, temperature, queue, **named)

    patch.setattr(task_module, "contrast_keys", contrast_keys)
    patch.setattr(FeatureQueue, "push", lambda self, **rows: None)  # once is enough


def mlm_teacher_sees_the_students_image(patch: Patch) -> None:
    replace_requests(
        patch,
        MaskedLanguageModelling,
        lambda self, r, batch, f: {"image_tokens": f.student.image_tokens.detach()} if r.by == "teacher" else {},
    )


def xmm_distillation_over_all_patches(patch: Patch) -> None:
    replace_requests(
        patch,
        CrossModalReconstruction,
        lambda self, r, batch, f: {"rows": torch.arange(batch["patch_mask"].numel())},
    )

    def loss(self: Any, batch: Any, features: Any, outputs: Any, alpha: float) -> Tensor:
        logits = self.networks.student.visual_head(outputs[0])
        teacher = self.networks.teacher.visual_head(outputs[1])
        hard = F.cross_entropy(logits[batch["masked_index"]], self._labels(batch))
        return (1 - alpha) * hard - alpha * (teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()

    patch.setattr(CrossModalReconstruction, "loss", loss)


def word_embeddings_without_padding_idx(patch: Patch) -> None:
    original = Simla.__init__

    def init(self: Any, config: Any) -> None:
        original(self, config)
        self.stream.embeddings.word.padding_idx = None

    patch.setattr(Simla, "__init__", init)


def tanh_gelu_in_bert(patch: Patch) -> None:
    def feed_forward(self: Any, x: Tensor) -> Tensor:
        return self.norm(self.down(F.gelu(self.up(x), approximate="tanh")), x)

    def transformed(self: Any, hidden: Tensor) -> Tensor:
        return self.norm(F.gelu(self.transform(hidden), approximate="tanh"))

    patch.setattr(FeedForward, "forward", feed_forward)
    patch.setattr(LanguageHead, "transformed", transformed)


def psl_reads_the_teachers_image(patch: Patch) -> None:
    replace_requests(patch, PseudoLabelledKeywords, lambda self, r, batch, f: {"image_tokens": f.teacher.image_tokens})


def psl_votes_by_mean_attention(patch: Patch) -> None:
    def positions(self: Any, batch: Any, attention: Tensor) -> tuple[Tensor, Tensor]:
        picked = attention.mean(1).topk(5, dim=-1).indices
        return picked, torch.ones_like(picked, dtype=torch.bool)

    patch.setattr(PseudoLabelledKeywords, "keyword_positions", positions)


def psl_removes_sep_and_pad(patch: Patch) -> None:
    original = PseudoLabelledKeywords.keyword_ids

    def keyword_ids(self: Any, batch: Any, attention: Tensor) -> Tensor:
        found = original(self, batch, attention)
        return found.masked_fill((found == self.vocabulary.pad) | (found == self.vocabulary.sep), -1)

    patch.setattr(PseudoLabelledKeywords, "keyword_ids", keyword_ids)


MUTATIONS: list[tuple[Callable[[Patch], None], str]] = [
    # the losses are those that the table names; of PSL and of the padding row only gradients and keywords tell
    (mlm_distillation_over_words, "loss.mlm grad.text_encoder.cls.predictions.bias"),
    (teacher_xmm_uses_the_teachers_embeddings, "loss.mim grad.mim_head.weight"),
    (xmm_attends_to_encoded_text, "loss.mim grad.mim_head.weight"),
    (xmm_ignores_caption_padding, "loss.mim grad.mim_head.weight"),
    (no_text_positions_on_the_image_stream, "loss.mim grad.visual_encoder.mask_token"),
    (no_layer_norm_on_the_image_stream, "loss.mim grad.visual_encoder.mask_token"),
    (no_ema_before_the_forward, "loss.ita loss.mlm grad.temp"),
    (queue_updated_before_ita, "loss.ita grad.temp"),
    (mlm_teacher_sees_the_students_image, "loss.mlm grad.text_encoder.cls.predictions.transform.dense.weight"),
    (xmm_distillation_over_all_patches, "loss.mim grad.mim_head.weight"),
    (word_embeddings_without_padding_idx, "grad.text_encoder.bert.embeddings.word_embeddings.weight"),
    (tanh_gelu_in_bert, "loss.mlm grad.text_encoder.cls.predictions.transform.dense.weight"),
    (psl_reads_the_teachers_image, "dbg.psl_cls_attention grad.concept_head.bias"),
    (psl_votes_by_mean_attention, "dbg.psl_keyword_ids grad.concept_head.bias"),
    (psl_removes_sep_and_pad, "loss.psl grad.concept_head.bias"),
]


@pytest.mark.parametrize(("mutate", "found_by"), MUTATIONS, ids=[mutate.__name__ for mutate, _ in MUTATIONS])
def test_a_misreading_is_found(
    mutate: Callable[[Patch], None], found_by: str, recorded_step: Path, tmp_path: Path, monkeypatch: Patch
):
    mutate(monkeypatch)
    verdict, rows = compare(recorded_step, tmp_path)
    assert not verdict
    for name in found_by.split():
        assert not rows[name]["error"] <= rows[name]["limit"], name
    teacher = [row["error"] for name, row in rows.items() if name.startswith("after.") and "_m." in name]
    assert max(teacher) <= 1e-6, "the mutation broke more than it says"


# --- recordings that were not handed over ---------------------------------------------------------------------------


def make_recording(folder: Path, seed: int = 1, **changes: Any) -> list[dict[str, dict[str, Tensor]]]:
    """Write a recording by the independent reference."""
    config = reference_step.make_config(**changes)
    generator = torch.Generator().manual_seed(seed)
    weights = reference_step.make_weights(config, generator)
    inputs = reference_step.make_inputs(config, weights, generator)
    return reference_step.record(folder, config, weights, inputs)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"width": 48, "heads": 3, "vit_heads": 4, "vit_mlp_ratio": 3}, id="width 48, other heads apart"),
        pytest.param({"image_res": 12, "patch": 4, "vit_depth": 3}, id="patches of 4 pixels"),
        pytest.param(
            {"image_res": 40, "batch": 5, "text_lengths": [9, 6, 5, 12, 7], "queue": 15, "queue_ptr_before": 5},
            id="25 patches, batch 5",
        ),
        pytest.param({"bert_layers": 4}, id="4 layers"),
        pytest.param({"bert_layers": 12}, id="12 layers"),
        pytest.param({"alphas": [0.0]}, id="alpha 0"),
        pytest.param({"text_lengths": [7, 7, 7]}, id="no padding"),
        pytest.param({"text_lengths": [5, 5, 5]}, id="captions as short as the keyword count"),
        pytest.param({"text_lengths": [9, 2, 3]}, id="captions shorter than the votes: pads get some"),
        pytest.param({"temp": 0.9}, id="temperature above its bound"),
        pytest.param({"temp": 1e-4}, id="temperature below its bound"),
        pytest.param({"queue_ptr_before": 9}, id="queue pointer wraps"),
        pytest.param({"queue": 3, "queue_ptr_before": 0}, id="queue as large as the batch"),
        pytest.param({"momentum": 0.9, "adamw": {"lr": 3e-4, "weight_decay": 0.1}}, id="other momentum and AdamW"),
        pytest.param(
            {"special": {"pad": 0, "unk": 4, "cls": 1, "sep": 2, "mask": 3}, "vocab": 35, "vtok": 90, "embed_dim": 24},
            id="other special ids and vocabularies",
        ),
    ],
)
def test_a_recording_of_other_sizes_verifies(changes: dict[str, Any], tmp_path: Path):
    make_recording(tmp_path / "recording", **changes)
    # 12 post-LN layers of weights of order one leave the last layer's queries 3e-5 of the largest gradient: the order
    # in which a CPU adds shows there
    tolerance = 3e-4 if changes.get("bert_layers") == 12 else 1e-4
    verdict, rows = compare(tmp_path / "recording", tmp_path, tolerance=tolerance)
    assert verdict, [row for row in rows.values() if not row["holds"]]
    every_parameter = len(reference_step.student_names(load_file(tmp_path / "recording" / "weights.safetensors")))
    assert sum(name.startswith("grad.") for name in rows) == every_parameter


def test_each_run_of_a_recording_is_compared_at_its_own_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "recording"
    results = make_recording(folder, alphas=[0.0, 0.1, 1.0])
    assert len({round(r["loss"]["total"].item(), 3) for r in results}) == 3
    assert verify_reference(folder)
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.endswith(".safetensors")] == [
        f"expected_alpha{alpha}.safetensors" for alpha in (0.0, 0.1, 1.0)
    ]
    # one wrong run among right ones is enough
    expected = load_file(folder / "expected_alpha0.1.safetensors")
    expected["loss.itm"] *= 1 + 2e-5
    save_file(expected, folder / "expected_alpha0.1.safetensors")
    assert not verify_reference(folder)


@pytest.mark.parametrize("seed", [3, 4])
def test_votes_that_tie_at_the_boundary_verify(seed: int, tmp_path: Path):
    """Equal votes in fifth and sixth place: the published choice is that of topk's internal order."""
    folder = tmp_path / "recording"
    (result,) = make_recording(folder, seed=seed, heads=4, batch=4, text_lengths=[12, 9, 6, 11], queue_ptr_before=4)
    votes = result["dbg"]["psl_counts"].sort(1, descending=True).values
    assert ((votes[:, 4] == votes[:, 5]) & (votes[:, 5] > 0)).any()
    assert verify_reference(folder)


@pytest.mark.parametrize(
    "name",
    [
        "visual_encoder.blocks.0.attn.qkv.weight",
        "text_encoder.bert.encoder.layer.1.crossattention.self.value.weight",
        "text_encoder.cls.predictions.transform.LayerNorm.weight",
        "concept_head_m.bias",
        "mim_head_m.weight",
        "temp",
    ],
)
def test_one_hundredth_on_one_weight_is_noticed(name: str, tmp_path: Path):
    folder = tmp_path / "recording"
    make_recording(folder)
    weights = load_file(folder / "weights.safetensors")
    weights[name].view(-1)[-1] += 1e-2
    save_file(weights, folder / "weights.safetensors")
    assert not verify_reference(folder)


@pytest.mark.parametrize("name", ["image_queue", "text_queue"])
def test_one_hundredth_on_one_queued_feature_is_noticed(name: str, tmp_path: Path):
    folder = tmp_path / "recording"
    make_recording(folder)
    inputs = load_file(folder / "inputs.safetensors")
    inputs[name][0, 0] += 1e-2
    save_file(inputs, folder / "inputs.safetensors")
    assert not verify_reference(folder)


def test_a_gradient_of_true_zero_is_held_against_the_largest_gradient(tmp_path: Path):
    """Attention's key biases: noise is forgiven, whatever its relative size, but a gradient there is not."""
    folder = tmp_path / "recording"
    make_recording(folder)
    name = "grad.text_encoder.bert.encoder.layer.0.attention.self.key.bias"
    expected = load_file(folder / "expected.safetensors")
    assert expected[name].abs().max() < 1e-12
    expected[name] = torch.full_like(expected[name], 1e-9)
    save_file(expected, folder / "expected.safetensors")
    assert verify_reference(folder)
    expected[name] = torch.full_like(expected[name], 1e-3)
    save_file(expected, folder / "expected.safetensors")
    assert not verify_reference(folder)


# --- what is no recording -------------------------------------------------------------------------------------------


@pytest.fixture
def recording(recorded_step: Path, tmp_path: Path) -> Path:
    """Return a copy of the recorded step that a test may break."""
    return Path(shutil.copytree(recorded_step, tmp_path / "copy"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_folder_without_a_recording_is_refused(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"is no recording: config\.json is missing"):
            verify_reference(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "inputs.safetensors", "expected.safetensors"])
def test_a_missing_file_is_named(name: str, recording: Path):
    (recording / name).unlink()
    with pytest.raises(ValueError, match=name):
        verify_reference(recording)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is no JSON"),
        ("[1]", "records a step of 'list'"),
        ('{"model_type": "bert"}', "config.json lacks model, special, grad_norm_names, batch, adamw, runs"),
    ],
    ids=["not JSON", "no object", "a model's configuration"],
)
def test_a_config_of_something_else_is_refused_in_one_line(text: str, message: str, recording: Path):
    (recording / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        verify_reference(recording)
    assert "\n" not in str(raised.value)


def test_a_recording_of_another_kind_of_step_is_refused_by_name(recording: Path):
    change_config(recording, kind="captioning")
    with pytest.raises(ValueError, match="records a step of 'captioning'; verify knows 'pretrain_step', 'retrieval'"):
        verify_reference(recording)


@pytest.mark.parametrize("name", ["dbg.unheard_of", "loss.unheard_of"])
def test_a_recorded_tensor_that_nothing_computes_is_an_error(name: str, recording: Path):
    expected = load_file(recording / "expected.safetensors")
    save_file({**expected, name: torch.ones(2)}, recording / "expected.safetensors")
    with pytest.raises(ValueError, match=re.escape(name)):
        verify_reference(recording)


def test_a_damaged_recording_is_one_line_with_its_file(recording: Path):
    inputs = recording / "inputs.safetensors"
    whole = load_file(inputs)
    save_file({name: tensor for name, tensor in whole.items() if name != "image"}, inputs)
    with pytest.raises(ValueError, match=r"inputs\.safetensors holds no image"):
        verify_reference(recording)
    expected = recording / "expected.safetensors"
    expected.write_bytes(expected.read_bytes()[:-100])
    save_file(whole, inputs)
    with pytest.raises(ValueError, match=r"expected\.safetensors is damaged"):
        verify_reference(recording)


def test_a_recording_with_no_run_does_not_count_as_verified(recording: Path):
    change_config(recording, runs={})
    assert not verify_reference(recording)
