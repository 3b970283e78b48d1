"""Pair probes: does the right caption of a picture score higher than a wrong one that hardly differs?

By ITC (cosine) and by ITM (raw logit of "matches"). One scorer for all formats, told apart by their keys:

    Winoground    JSON lines {"image_0", "image_1", "caption_0", "caption_1"}: two pictures, two captions
    ARO           JSON list of {"image_path", "true_caption", "false_caption", "bbox_x", "bbox_y", "bbox_w", "bbox_h"}
                  with "relation_name" or "attributes": a pair; the picture is cut to the box
    SugarCrepe    JSON object of {"filename", "caption", "negative_caption"}
    VL-CheckList  JSON list of [picture, {"POS": [caption], "NEG": [caption, ...]}]
    ours          JSON list of {"images": [path, ...], "captions": [text, ...], "kind": optional}; captions beyond the
                  pictures' number are right for none

I pictures and C >= I captions a probe; caption i is right for picture i. Scenes' own probes: scene_swaps.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from simla_ds.data.processor import SimlaProcessor
from simla_ds.downstream.annotations import (
    Annotations,
    Entry,
    FolderPictures,
    check_annotations,
    read_json,
    wrong_text,
)
from simla_ds.downstream.scenes import scene_annotations
from simla_ds.hub import load_model_folder
from simla_ds.model.simla import Simla

SCORES = ("itc", "itm")
ARO_LEFT_OUT = frozenset(
    name.strip()
    for name in """
        adjusting, around, attached to, beside, between, bigger than, biting, boarding, brushing, by, chewing,
        cleaning, climbing, close to, coming from, coming out of, contain, crossing, dragging, draped over,
        drinking, drinking from, driving, driving down, driving on, eating from, eating in, enclosing, exiting,
        facing, filled with, floating in, floating on, flying, flying above, flying in, flying over, flying through,
        full of, going down, going into, going through, grazing in, growing in, growing on, guiding, hanging from,
        hanging in, hanging off, hanging over, higher than, holding onto, hugging, in between, jumping off, jumping
        on, jumping over, kept in, larger than, leading, leaning over, leaving, licking, longer than, looking in,
        looking into, looking out, looking over, looking through, lying next to, lying on top of, making, mixed
        with, mounted on, moving, near, next to, of, on the back of, on the edge of, on the front of, on the other
        side of, on the side of, opening, painted on, parked at, parked beside, parked by, parked in, parked in
        front of, parked near, parked next to, perched on, petting, piled on, playing, playing in, playing on,
        playing with, pouring, reaching for, reading, reflected on, riding on, running in, running on, running
        through, seen through, sitting behind, sitting beside, sitting by, sitting in front of, sitting near,
        sitting next to, sitting under, skiing down, skiing on, sleeping in, sleeping on, smiling at, sniffing,
        splashing, sprinkled on, stacked on, standing against, standing around, standing behind, standing beside,
        standing in front of, standing near, standing next to, staring at, stuck in, surrounding, swimming in,
        swinging, talking to, topped with, touching, traveling down, traveling on, tying, typing on, underneath,
        wading in, waiting for, walking across, walking by, walking down, walking next to, walking through, with,
        working in, working on, worn on, wrapped around, wrapped in
        """.replace("\n        ", " ").split(",")
)
"""Relations that ARO's published macro accuracy leaves out: those that read as true both ways, and rare ones."""
ARO_FEWEST = 25
"""Probes that a pair of attributes needs to count in ARO's published macro accuracy."""


def probe_folder(
    folder: Path, source: str, image_root: str = "", *, limit: int = 0, batch_size: int = 32, device: str = "auto"
) -> dict[str, float]:
    """Return the measures of a pretrained model folder on probes: a file of a format above, or scenes' shards.

    limit: scenes used, 0: all. device: as hub.load_model_folder's. Raises ValueError: bad entries (all of them are
    told), a folder of another task.
    """
    model, _ = load_model_folder(folder, device=device)
    probes = load_probes(source, image_root, limit=limit)
    predictions = score_probes(model, SimlaProcessor.from_pretrained(folder), probes, batch_size=batch_size)
    return measures(probes.entries, predictions)


def load_probes(source: str, image_root: str = "", *, limit: int = 0) -> Annotations:
    """Return checked probes in our format, of a JSON or JSONL file or made of scenes' shards. Raises ValueError."""
    if source.endswith((".json", ".jsonl")):
        found = read_probes(Path(source), Path(image_root) if image_root else None)
    else:
        found = scene_annotations("probes", source, limit=limit)
    check_annotations(found, lambda entry: entry["images"], _problems, lambda entry: None)
    return found


def read_probes(file: Path, image_root: Path | None) -> Annotations:
    """Read a file of any format and give its probes ours; what is not there stays away, for the check to tell."""
    try:
        content = read_json(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read as probes: {error}") from error
    raw = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(raw, list) or not raw:
        raise ValueError(
            f"{file} must hold probes in a list, an object or JSON lines (formats: simla_ds.downstream.probes)"
        )
    raw = [
        {"image": e[0], **e[1]} if isinstance(e, list) and len(e) == 2 and isinstance(e[1], dict) else e for e in raw
    ]
    first = raw[0] if isinstance(raw[0], dict) else {}
    make = next((make for key, make in FORMATS.items() if key in first), None)
    if make is None:
        raise ValueError(
            f"{file}: its first entry has none of the keys {', '.join(FORMATS)} that tell a format of probes"
        )
    entries = [{"kind": file.stem, **make(entry if isinstance(entry, dict) else {})} for entry in raw]
    return Annotations(str(file), entries, FolderPictures(image_root or file.parent))


def _winoground(entry: Entry) -> Entry:
    pictures = [entry.get(f"image_{i}") for i in (0, 1)]
    named = [f"{p}.png" if isinstance(p, str) and not Path(p).suffix else p for p in pictures]
    captions = [entry.get(f"caption_{i}") for i in (0, 1)]
    return {"images": named, "captions": captions, **_kind(entry, "collapsed_tag")}


def _aro(entry: Entry) -> Entry:
    box = [entry.get(f"bbox_{side}") for side in "xywh"]
    crop = {"crop": box} if any(value is not None for value in box) else {}
    captions = [entry.get("true_caption"), entry.get("false_caption")]
    found = {"images": [entry.get("image_path")], "captions": captions, **crop, **_kind(entry, "relation_name")}
    if "kind" in found:
        return {**found, "in_macro_from": None if found["kind"] in ARO_LEFT_OUT else 1}
    if isinstance(pair := entry.get("attributes"), list):
        return {**found, "kind": "_".join(map(str, pair)), "in_macro_from": ARO_FEWEST}
    return found


def _sugar_crepe(entry: Entry) -> Entry:
    return {"images": [entry.get("filename")], "captions": [entry.get("caption"), entry.get("negative_caption")]}


def _vl_checklist(entry: Entry) -> Entry:
    right, wrong = entry.get("POS"), entry.get("NEG")
    captions = [*right[:1], *wrong] if isinstance(right, list) and isinstance(wrong, list) else None
    return {"images": [entry.get("image")], "captions": captions}


FORMATS: dict[str, Callable[[Entry], Entry]] = {
    "image_0": _winoground,
    "true_caption": _aro,
    "negative_caption": _sugar_crepe,
    "NEG": _vl_checklist,
    "captions": dict,
}
"""By a key that only this format has."""


def _kind(entry: Entry, key: str) -> Entry:
    return {"kind": str(entry[key])} if entry.get(key) else {}


def _problems(entry: Entry) -> Iterator[str]:
    images, captions = entry.get("images"), entry.get("captions")
    if images is None or captions is None or not (_texts(images) and _texts(captions)):
        yield "a probe needs the names of its pictures and its captions, all of them texts"
    elif len(captions) < max(2, len(images)):
        yield f"{len(captions)} caption(s) for {len(images)} picture(s): nothing to tell apart"
    crop = entry.get("crop")
    if crop is not None and not all(isinstance(value, (int, float)) and value >= 0 for value in crop):
        yield "bbox_x, bbox_y, bbox_w and bbox_h must be numbers"
    yield from wrong_text(entry, "kind")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


@torch.no_grad()
def score_probes(
    model: Simla, processor: SimlaProcessor, probes: Annotations, *, batch_size: int = 32
) -> list[dict[str, Any]]:
    """Return `entry`, and `itc` and `itm`: scores of each picture (outer list) with each caption of the probe.

    model: in eval mode, on the device to use. ValueError names a picture that cannot be read.
    """
    found = []
    for start in range(0, len(probes.entries), batch_size):
        chunk = probes.entries[start : start + batch_size]
        scores = _score(model, processor, probes, chunk)
        shapes = [(len(entry["images"]), len(entry["captions"])) for entry in chunk]
        for number, shape in enumerate(shapes):
            size = shape[0] * shape[1]
            own = {name: values[:size].view(shape).tolist() for name, values in scores.items()}
            scores = {name: values[size:] for name, values in scores.items()}
            found.append({"entry": start + number, **own})
    return found


def _score(model: Simla, processor: SimlaProcessor, probes: Annotations, chunk: Sequence[Entry]) -> dict[str, Tensor]:
    """Score every picture with every caption of the same probe, one probe behind the other: (P,) float32 each.

    What several probes of the chunk share (a scene's picture, its true caption) is computed once.
    """
    wanted = [
        ((name, tuple(entry.get("crop", ()))), caption)
        for entry in chunk
        for name in entry["images"]
        for caption in entry["captions"]
    ]
    pairs = {pair: number for number, pair in enumerate(dict.fromkeys(wanted))}
    pictures = {picture: number for number, picture in enumerate(dict.fromkeys(picture for picture, _ in pairs))}
    captions = {caption: number for number, caption in enumerate(dict.fromkeys(caption for _, caption in pairs))}
    inputs = processor([_picture(probes, *picture) for picture in pictures], list(captions))
    inputs = inputs.to(next(model.parameters()).device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    image = model.image_encoder(inputs["pixel_values"])
    text, _ = model.stream(model.stream.embeddings(ids), mask)
    of_image = torch.tensor([pictures[picture] for picture, _ in pairs], device=ids.device)
    of_caption = torch.tensor([captions[caption] for _, caption in pairs], device=ids.device)
    cosine = (model.image_feature(image)[of_image] * model.text_feature(text)[of_caption]).sum(-1)
    fused, _ = model.text_over_image(ids[of_caption], mask[of_caption], image, of_image)
    match = model.match_head(fused[:, 0]).float()[:, 1]
    order = torch.tensor([pairs[pair] for pair in wanted], device=ids.device)
    return {"itc": cosine[order].cpu(), "itm": match[order].cpu()}


def _picture(probes: Annotations, name: str, crop: Sequence[float]) -> Image.Image:
    picture = probes.picture(name)
    if not crop:
        return picture
    x, y, w, h = crop
    return picture.crop((x, y, x + w, y + h))


def measures(entries: Sequence[Entry], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return by `itc/` and `itm/` the percentage of probes that are told right, of all and of each kind.

    `accuracy`: for each picture its caption scores highest, above (not level with) all others: Winoground's text score.
    Where probes have several pictures also `image` (for each caption its picture does) and `group` (both). `macro` is
    the mean over kinds, of ARO over those that its authors count. `probes` and `probes/KIND` count them.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    kinds = [entries[said["entry"]]["kind"] for said in predictions]
    for kind, said in zip(kinds, predictions, strict=True):
        for name in SCORES:
            scores = torch.tensor(said[name])
            by_text, several = _picks_own(scores), len(scores) > 1
            found = {"accuracy": by_text, f"kind/{kind}": by_text}
            if several:
                by_image = _picks_own(scores[:, : len(scores)].T)
                found |= {"image": by_image, "group": by_image and by_text}
            for key, value in found.items():
                right[f"{name}/{key}"].append(value)
    shares = {name: 100 * sum(values) / len(values) for name, values in right.items()}
    counts = Counter(kinds)
    needed = {entry["kind"]: entry.get("in_macro_from", 1) for entry in entries}
    counted = [kind for kind, count in counts.items() if needed[kind] is not None and count >= needed[kind]]
    if counted:
        for name in SCORES:
            shares[f"{name}/macro"] = sum(shares[f"{name}/kind/{kind}"] for kind in counted) / len(counted)
    by_kind = {f"probes/{kind}": float(count) for kind, count in counts.items()}
    return {**shares, "probes": float(len(kinds)), **by_kind}


def _picks_own(scores: Tensor) -> bool:
    """Whether row i of (I, C) is highest in column i, for all rows."""
    own = scores.diagonal()[:, None]
    return bool(((scores < own).sum(1) == scores.shape[1] - 1).all())
