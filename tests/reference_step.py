"""The official pretraining step in plain tensor functions, float64: an oracle, and a writer of recordings in any size.

Written from the published description of the official implementation alone: it imports nothing of simla_ds, so that a
misreading there cannot be repeated here. `record` writes the folder that `simla verify` reads.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]

STUDENT_OF = {  # the teacher's prefix: the student's
    "visual_encoder_m.": "visual_encoder.",
    "text_encoder_m.": "text_encoder.",
    "vision_proj_m.": "vision_proj.",
    "text_proj_m.": "text_proj.",
    "mim_head_m.": "mim_head.",
    "concept_head_m.": "concept_head.",
}
BUFFERS = ("image_queue", "text_queue", "queue_ptr")
TIED = {  # stored as copies: the alias's ending, the parameter's
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


# --- networks -------------------------------------------------------------------------------------------------------


def vision(w: Tensors, prefix: str, image: Tensor, sizes: dict, masked: Tensor | None = None) -> Tensor:
    """Return (B, N, D) of the pre-LN ViT under `prefix`; (B, P) bool `masked` patches become the mask token."""
    x = F.conv2d(image, w[prefix + "patch_embed.proj.weight"], w[prefix + "patch_embed.proj.bias"], sizes["patch"])
    x = x.flatten(2).transpose(1, 2)
    if masked is not None:
        x = torch.where(masked[..., None], w[prefix + "mask_token"], x)
    x = torch.cat([w[prefix + "cls_token"].expand(len(x), -1, -1), x], dim=1) + w[prefix + "pos_embed"]
    for i in range(sizes["vit_depth"]):
        p = f"{prefix}blocks.{i}."
        q, k, v = linear(w, p + "attn.qkv", norm(w, p + "norm1", x, 1e-6)).chunk(3, dim=-1)
        x = x + linear(w, p + "attn.proj", attend(q, k, v, sizes["vit_heads"])[0])
        x = x + linear(w, p + "mlp.fc2", F.gelu(linear(w, p + "mlp.fc1", norm(w, p + "norm2", x, 1e-6))))
    return norm(w, prefix + "norm", x, 1e-6)


def embed(w: Tensors, bert: str, ids: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
    """Return the embedding layer's output for token ids, or for vectors given in place of the words'."""
    if vectors is None:
        assert ids is not None
        vectors = F.embedding(ids, w[bert + "embeddings.word_embeddings.weight"], padding_idx=0)
    positions = w[bert + "embeddings.position_embeddings.weight"][: vectors.shape[1]]
    return norm(w, bert + "embeddings.LayerNorm", vectors + positions, 1e-12)


def stack(
    w: Tensors,
    bert: str,
    x: Tensor,
    mask: Tensor | None,
    sizes: dict,
    keys: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run every post-LN layer; with `keys` each has its cross-attention. Return rows and the last self-attention."""
    probabilities = x
    for i in range(sizes["bert_layers"]):
        p = f"{bert}encoder.layer.{i}."
        x, probabilities = attention_block(w, p + "attention.", x, x, mask, -10_000.0, sizes["heads"])
        if keys is not None:
            floor = torch.finfo(torch.float32).min
            x, _ = attention_block(w, p + "crossattention.", x, keys, key_mask, floor, sizes["heads"])
        inner = F.gelu(linear(w, p + "intermediate.dense", x))
        x = norm(w, p + "output.LayerNorm", linear(w, p + "output.dense", inner) + x, 1e-12)
    return x, probabilities


def attention_block(
    w: Tensors, p: str, x: Tensor, keys: Tensor, mask: Tensor | None, floor: float, heads: int
) -> tuple[Tensor, Tensor]:
    """Attention, output projection, residual and LayerNorm of one BERT layer."""
    q, k, v = linear(w, p + "self.query", x), linear(w, p + "self.key", keys), linear(w, p + "self.value", keys)
    bias = None if mask is None else (1 - mask.to(x.dtype))[:, None, None, :] * floor
    context, probabilities = attend(q, k, v, heads, bias)
    return norm(w, p + "output.LayerNorm", linear(w, p + "output.dense", context) + x, 1e-12), probabilities


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Multi-head attention; return (B, Lq, D) and the probabilities (B, H, Lq, Lk)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    probabilities = (scores if bias is None else scores + bias).softmax(-1)
    return (probabilities @ v).transpose(1, 2).flatten(2), probabilities


def linear(w: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[name + ".weight"], w[name + ".bias"])


def norm(w: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)


def mlm_logits(w: Tensors, prefix: str, rows: Tensor) -> Tensor:
    """Return (..., V): dense, GELU, LayerNorm, then the decoder tied to the word embeddings."""
    p = prefix + "cls.predictions."
    x = norm(w, p + "transform.LayerNorm", F.gelu(linear(w, p + "transform.dense", rows)), 1e-12)
    return F.linear(x, w[prefix + "bert.embeddings.word_embeddings.weight"], w[p + "bias"])


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * logits.log_softmax(-1)).sum(-1)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# --- the step -------------------------------------------------------------------------------------------------------


def step(weights: Tensors, inputs: Tensors, config: dict, alpha: float) -> dict[str, Tensors]:
    """Run one official step in float64; return losses, gradients of every student parameter, what changed, and dbg."""
    sizes, special = config["model"], config["special"]
    w = {n: t.double() if t.is_floating_point() else t for n, t in weights.items() if not n.endswith(tuple(TIED))}
    w["temp"] = w["temp"].clamp(0.001, 0.5)
    m = sizes["momentum"]
    for teacher, student in STUDENT_OF.items():
        for name in [n for n in w if n.startswith(teacher) and w[n].is_floating_point()]:
            w[name] = m * w[name] + (1 - m) * w[name.replace(teacher, student)]
    student = {n: w[n].requires_grad_() for n in student_names(w)}

    x, ids, mask = inputs["image"].double(), inputs["input_ids"], inputs["attention_mask"]
    hidden = inputs["masked_visual_token_pos"].bool()
    losses, dbg = {}, {}
    image = vision(w, "visual_encoder.", x, sizes)
    v = unit(linear(w, "vision_proj", image[:, 0]))
    f, f_m = "text_encoder.bert.", "text_encoder_m.bert."
    t = unit(linear(w, "text_proj", stack(w, f, embed(w, f, ids), mask, sizes)[0][:, 0]))
    with torch.no_grad():
        image_m = vision(w, "visual_encoder_m.", x, sizes)
        v_m = unit(linear(w, "vision_proj_m", image_m[:, 0]))
        t_m = unit(linear(w, "text_proj_m", stack(w, f_m, embed(w, f_m, ids), mask, sizes)[0][:, 0]))
    after = {"temp": w["temp"].detach().clone()}

    losses["ita"] = image_text_alignment(w, inputs, (v, t, v_m, t_m), alpha, dbg, after)
    losses["itm"] = image_text_matching(w, inputs, image, sizes, dbg)

    # MLM: the same masked ids to both; the teacher reads its own image. Its normalisation runs over positions.
    masked_ids, labels = inputs["mlm_input_ids"], inputs["mlm_labels"]
    chosen = labels != -100
    z = mlm_logits(w, "text_encoder.", stack(w, f, embed(w, f, masked_ids), mask, sizes, image)[0])
    with torch.no_grad():
        z_m = mlm_logits(w, "text_encoder_m.", stack(w, f_m, embed(w, f_m, masked_ids), mask, sizes, image_m)[0])
    distilled = -(z_m.softmax(-1) * z.log_softmax(1)).sum(-1)
    losses["mlm"] = (1 - alpha) * F.cross_entropy(z[chosen], labels[chosen]) + alpha * distilled[chosen].mean()
    dbg["mlm_logits_masked_positions"] = z[chosen]

    losses["mim"] = visual_token_prediction(w, inputs, x, hidden, alpha, sizes, dbg)

    # PSL: the momentum stack over the student's image; keywords from the last text self-attention's CLS row.
    with torch.no_grad():
        attention = stack(w, f_m, embed(w, f_m, ids), mask, sizes, image)[1][:, :, 0]
        votes = F.one_hot(attention.topk(4, dim=-1).indices, ids.shape[1]).sum((1, 2))
        keywords = ids.gather(1, votes.topk(5, dim=-1).indices)
        hard = torch.zeros(len(ids), sizes["vocab"], dtype=x.dtype).scatter_(1, keywords, 1.0)
        hard[:, special["cls"]] = 0
        soft = linear(w, "concept_head_m", v_m).sigmoid()
    h = linear(w, "concept_head", v)
    bce = F.binary_cross_entropy_with_logits
    losses["psl"] = (1 - alpha) * bce(h, hard) + alpha * bce(h, soft)
    dbg |= {"psl_cls_attention": attention, "psl_counts": votes, "psl_keyword_ids": keywords}
    dbg |= {"psl_hard_nonzero": hard.nonzero(), "psl_logits": h, "psl_soft_targets": soft}
    dbg |= {"image_embeds": image, "image_feat": v, "image_feat_m": v_m, "text_feat": t, "text_feat_m": t_m}

    losses["total"] = torch.stack([losses[n] for n in ("mlm", "ita", "itm", "mim", "psl")]).sum()
    losses["total"].backward()
    after |= {n: w[n] for n in w if n.startswith(tuple(STUDENT_OF)) and w[n].is_floating_point()}
    gradients = {n: p.grad for n, p in student.items() if p.grad is not None}
    assert len(gradients) == len(student), "every student parameter gets a gradient"
    return {"loss": losses, "grad": gradients, "after": after, "dbg": dbg, "adamw": adamw(student, config["adamw"])}


def image_text_alignment(
    w: Tensors, inputs: Tensors, features: tuple[Tensor, ...], alpha: float, dbg: Tensors, after: Tensors
) -> Tensor:
    """The contrastive loss against in-batch keys and queue; the queue is overwritten after it."""
    v, t, v_m, t_m = features
    rows, temperature = len(v), w["temp"]
    keys = {"text": torch.cat([t_m.T, inputs["text_queue"].double()], 1)}
    keys["image"] = torch.cat([v_m.T, inputs["image_queue"].double()], 1)
    hard = F.one_hot(torch.arange(rows), keys["text"].shape[1]).double()
    losses = []
    for own, own_m, other, name in ((v, v_m, "text", "sim_i2t"), (t, t_m, "image", "sim_t2i")):
        with torch.no_grad():
            target = alpha * (own_m @ keys[other] / temperature).softmax(1) + (1 - alpha) * hard
        dbg[name] = own @ keys[other] / temperature
        losses.append(soft_cross_entropy(dbg[name], target).mean())
    pointer, queue = int(inputs["queue_ptr"]), inputs["text_queue"].shape[1]
    for name, new in (("image_queue", v_m), ("text_queue", t_m)):
        after[name] = inputs[name].double().clone()
        after[name][:, pointer : pointer + rows] = new.T
    after["queue_ptr"] = torch.tensor([(pointer + rows) % queue])
    return (losses[0] + losses[1]) / 2


def image_text_matching(w: Tensors, inputs: Tensors, image: Tensor, sizes: dict, dbg: Tensors) -> Tensor:
    """Cross-entropy over the matched pairs, the wrong images and the wrong captions, drawn beforehand."""
    ids, mask, f = inputs["input_ids"], inputs["attention_mask"], "text_encoder.bert."
    wrong_image, wrong_text = inputs["neg_image_idx"], inputs["neg_text_idx"]
    texts = torch.cat([ids, ids, ids[wrong_text]])
    masks = torch.cat([mask, mask, mask[wrong_text]])
    images = torch.cat([image, image[wrong_image], image])
    rows = stack(w, f, embed(w, f, texts), masks, sizes, images)[0]
    dbg["itm_logits"] = linear(w, "itm_head", rows[:, 0])
    labels = torch.cat([torch.ones(len(ids)), torch.zeros(2 * len(ids))]).long()
    return F.cross_entropy(dbg["itm_logits"], labels)


def visual_token_prediction(
    w: Tensors, inputs: Tensors, x: Tensor, hidden: Tensor, alpha: float, sizes: dict, dbg: Tensors
) -> Tensor:
    """XMM: image rows query the embedding layer's output of the unmasked caption (the student's, for both networks)."""
    ids, mask, f, f_m = inputs["input_ids"], inputs["attention_mask"], "text_encoder.bert.", "text_encoder_m.bert."
    words = embed(w, f, ids)
    rows_in = vision(w, "visual_encoder.", x, sizes, hidden)
    rows = stack(w, f, embed(w, f, vectors=rows_in), None, sizes, words, mask)[0]
    with torch.no_grad():
        rows_in_m = vision(w, "visual_encoder_m.", x, sizes, hidden)
        rows_m = stack(w, f_m, embed(w, f_m, vectors=rows_in_m), None, sizes, words, mask)[0]
        u_m = linear(w, "mim_head_m", rows_m[:, 1:])
    u = linear(w, "mim_head", rows[:, 1:])
    codes = inputs["visual_tok_labels"]
    distilled = soft_cross_entropy(u, u_m.softmax(-1))[hidden].mean()
    dbg["masked_image_embeds_first_sample"], dbg["xmm_bert_out_first_sample"] = rows_in[0], rows[0]
    dbg["xmm_logits_masked_first_sample"] = u[0][hidden[0]]
    dbg["xmm_logits_m_masked_first_sample"] = u_m[0][hidden[0]]
    return (1 - alpha) * F.cross_entropy(u[hidden], codes) + alpha * distilled


def adamw(student: Tensors, settings: dict) -> Tensors:
    """One AdamW step from fresh moments; 1-D parameters and biases are not decayed.

    Left out are tensors with a true gradient of zero anywhere that is not exactly zero (attention's key biases): the
    first step is lr * sign(rounding noise) there.
    """
    after, rate = {}, settings["lr"]
    largest = max(p.grad.abs().max() for p in student.values() if p.grad is not None)
    for name, p in student.items():
        assert p.grad is not None
        if ((p.grad != 0) & (p.grad.abs() < 1e-7 * largest)).any():
            continue
        decay = 0.0 if p.ndim == 1 or name.endswith(".bias") else settings["weight_decay"]
        after[name] = (p * (1 - rate * decay) - rate * p.grad / (p.grad.abs() + 1e-8)).detach()
    return after


def student_names(weights: Tensors) -> list[str]:
    """Return the names of the student's parameters, without teacher, buffers, position ids and tied copies, sorted."""
    skip = tuple(STUDENT_OF)
    return sorted(
        n for n in weights if not n.startswith(skip) and not n.endswith((*TIED, "position_ids")) and n not in BUFFERS
    )


# --- recordings -----------------------------------------------------------------------------------------------------


def make_config(**changes: object) -> dict:
    """Return a recording's configuration: a tiny model, and whatever `changes` names ("model" entries by their key)."""
    model = {"width": 32, "vit_depth": 1, "vit_heads": 2, "vit_mlp_ratio": 4, "patch": 8, "image_res": 24}
    model |= {"heads": 2, "intermediate": 40, "bert_layers": 2, "vocab": 60, "max_pos": 32, "embed_dim": 16}
    model |= {"queue": 12, "dropout": 0.0, "vtok": 40, "temp": 0.07, "momentum": 0.995, "mlm_probability": 0.15}
    config = {
        "model": {k: changes.pop(k, v) for k, v in model.items()},
        "special": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
        "batch": 3,
        "text_lengths": [8, 5, 7],
        "alphas": [0.4],
        "adamw": {"lr": 1e-3, "weight_decay": 0.02},
        "queue_ptr_before": 3,
        "seed": 5,
        "loss_order": ["mlm", "ita", "itm", "mim", "psl"],
        "total": "mlm+itm+ita+mim+psl",
    }
    assert not changes.keys() - config.keys(), f"unknown settings {sorted(changes.keys() - config.keys())}"
    return config | changes


def make_weights(config: dict, generator: torch.Generator) -> Tensors:
    """Return a complete official state dict, teacher apart from the student, with O(1) activations everywhere."""
    s = config["model"]
    d, e = s["width"], s["embed_dim"]
    shapes: dict[str, tuple[int, ...]] = {}

    def dense(name: str, out: int, into: int) -> None:
        shapes[name + ".weight"], shapes[name + ".bias"] = (out, into), (out,)

    def layer_norm(name: str) -> None:
        shapes[name + ".weight"], shapes[name + ".bias"] = (d,), (d,)

    for m in ("", "_m"):
        p = f"visual_encoder{m}."
        rows = (s["image_res"] // s["patch"]) ** 2 + 1
        shapes |= {p + "cls_token": (1, 1, d), p + "mask_token": (1, 1, d), p + "pos_embed": (1, rows, d)}
        shapes |= {p + "patch_embed.proj.weight": (d, 3, s["patch"], s["patch"]), p + "patch_embed.proj.bias": (d,)}
        for i in range(s["vit_depth"]):
            b = f"{p}blocks.{i}."
            layer_norm(b + "norm1")
            layer_norm(b + "norm2")
            dense(b + "attn.qkv", 3 * d, d)
            dense(b + "attn.proj", d, d)
            dense(b + "mlp.fc1", s["vit_mlp_ratio"] * d, d)
            dense(b + "mlp.fc2", d, s["vit_mlp_ratio"] * d)
        layer_norm(p + "norm")
        p = f"text_encoder{m}.bert."
        shapes[p + "embeddings.word_embeddings.weight"] = (s["vocab"], d)
        shapes[p + "embeddings.position_embeddings.weight"] = (s["max_pos"], d)
        layer_norm(p + "embeddings.LayerNorm")
        for i in range(s["bert_layers"]):
            b = f"{p}encoder.layer.{i}."
            for kind in ("attention", "crossattention"):
                for part in ("query", "key", "value"):
                    dense(f"{b}{kind}.self.{part}", d, d)
                dense(f"{b}{kind}.output.dense", d, d)
                layer_norm(f"{b}{kind}.output.LayerNorm")
            dense(b + "intermediate.dense", s["intermediate"], d)
            dense(b + "output.dense", d, s["intermediate"])
            layer_norm(b + "output.LayerNorm")
        p = f"text_encoder{m}.cls.predictions."
        dense(p + "transform.dense", d, d)
        layer_norm(p + "transform.LayerNorm")
        shapes[p + "bias"] = (s["vocab"],)
        dense("vision_proj" + m, e, d)
        dense("text_proj" + m, e, d)
        dense("mim_head" + m, s["vtok"], d)
        dense("concept_head" + m, s["vocab"], e)
    dense("itm_head", 2, d)

    weights: Tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(("LayerNorm.weight", "norm1.weight", "norm2.weight", "norm.weight")):
            weights[name] = 1 + 0.1 * noise
        elif len(shape) == 1:
            weights[name] = 0.1 * noise
        else:
            weights[name] = noise * (0.5 if "embed" in name or "token" in name else 1 / math.sqrt(shape[-1]))
        if name.startswith(tuple(STUDENT_OF)):  # close to the student, as a teacher is, but not it
            teacher = next(t for t in STUDENT_OF if name.startswith(t))
            weights[name] = 0.8 * weights[name.replace(teacher, STUDENT_OF[teacher])] + 0.3 * weights[name]
    for m in ("", "_m"):
        for alias, source in TIED.items():
            weights[f"text_encoder{m}.{alias}"] = weights[f"text_encoder{m}.{source}"].clone()
        weights[f"text_encoder{m}.bert.embeddings.position_ids"] = torch.arange(s["max_pos"])[None]
    weights["temp"] = torch.tensor(s["temp"])
    for name in ("image_queue", "text_queue"):
        weights[name] = unit(torch.randn(s["queue"], e, generator=generator)).T.contiguous()
    weights["queue_ptr"] = torch.tensor([config["queue_ptr_before"]])
    return weights


def make_inputs(config: dict, weights: Tensors, generator: torch.Generator) -> Tensors:
    """Return one batch with every random draw of the step."""
    s, special, lengths = config["model"], config["special"], torch.tensor(config["text_lengths"])
    batch, longest, patches = config["batch"], int(lengths.max()), (s["image_res"] // s["patch"]) ** 2
    assert len(lengths) == batch

    def randint(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = randint(5, s["vocab"], batch, longest)
    ids[:, 0] = special["cls"]
    ids[torch.arange(batch), lengths - 1] = special["sep"]
    ids = torch.where(mask.bool(), ids, special["pad"])
    chosen = (torch.rand(batch, longest, generator=generator) < 0.3) & mask.bool() & (ids != special["cls"])
    chosen[0, 1] = True  # at least one
    how = torch.rand(batch, longest, generator=generator)
    replaced = torch.where(how < 0.8, special["mask"], torch.where(how < 0.9, randint(0, s["vocab"], 1), ids))
    hidden = torch.rand(batch, patches, generator=generator).argsort(1) < max(1, patches * 3 // 8)
    codes = randint(0, s["vtok"], batch, patches)
    return {
        "image": torch.randn(batch, 3, s["image_res"], s["image_res"], generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "mlm_input_ids": torch.where(chosen, replaced, ids),
        "mlm_labels": torch.where(chosen, ids, -100),
        "neg_image_idx": (torch.arange(batch) + randint(1, batch, batch)) % batch,
        "neg_text_idx": (torch.arange(batch) + randint(1, batch, batch)) % batch,
        "visual_token_ids": codes,
        "masked_visual_token_pos": hidden,
        "visual_tok_labels": codes[hidden],
        **{name: weights[name] for name in BUFFERS},
        "alpha": torch.tensor(config["alphas"][:1]),
    }


def record(folder: Path, config: dict, weights: Tensors, inputs: Tensors) -> list[dict[str, Tensors]]:
    """Write a recording of one run per alpha into `folder`; return the float64 results."""
    folder.mkdir(parents=True, exist_ok=True)
    names, results, runs = student_names(weights), [], {}
    for alpha in config["alphas"]:
        result = step(weights, inputs, config, alpha)
        results.append(result)
        tensors = {
            f"{group}.{n}": t for group in ("loss", "grad", "after", "adamw", "dbg") for n, t in result[group].items()
        }
        tensors["grad_norms_all"] = torch.stack([result["grad"][n].norm() for n in names])
        tensors = {n: t.detach().float() if t.is_floating_point() else t for n, t in tensors.items()}
        tensors |= {f"loss64.{n}": t.detach() for n, t in result["loss"].items()}
        file = "expected.safetensors" if len(config["alphas"]) == 1 else f"expected_alpha{alpha}.safetensors"
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / file)
        losses = {f"loss.{n}": t.item() for n, t in result["loss"].items()}
        runs[file] = {"alpha": alpha, "losses": losses}
    weight_decay = {
        n: 0.0 if weights[n].ndim == 1 or n.endswith(".bias") else config["adamw"]["weight_decay"] for n in names
    }
    described = config | {"runs": runs, "grad_norm_names": names, "weight_decay_groups": weight_decay}
    (folder / "config.json").write_text(json.dumps(described, indent=1))
    save_file({n: t.contiguous().clone() for n, t in weights.items()}, folder / "weights.safetensors")
    save_file({n: t.contiguous().clone() for n, t in inputs.items()}, folder / "inputs.safetensors")
    return results
