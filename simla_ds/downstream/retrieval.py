"""Zero-shot retrieval: the picture of a caption, the caption of a picture.  (SIMLA section 4, as ALBEF section 4)

First by cosine similarity (ITC); then the best `rerank` candidates of each query are read together with it and ordered
by ITM's raw logit of "matches". I pictures, T captions, U distinct captions, E projection width, K candidates. Neither
gradients nor deepspeed are needed; ranks, where there are some, share the re-ranking.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from simla_ds.data.processor import SimlaProcessor
from simla_ds.data.samples import Samples
from simla_ds.downstream.annotations import Annotations
from simla_ds.downstream.gallery import Gallery, encode, match_scores
from simla_ds.model.simla import Simla
from simla_ds.objectives.collectives import gather_by_rank, of_first_rank, rank, world_size

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class Protocol:
    """How an evaluation is done; numbers of different protocols cannot be compared."""

    rerank: int
    """Candidates of each query that ITM orders."""
    rerank_many: int
    """The same among more than MANY pictures."""
    image_size: int | None
    """Side of the pictures in pixels; None: as the model was trained."""
    max_tokens: int | None
    """Tokens of a caption that are read; None: as the model was trained."""

    def candidates(self, pictures: int) -> int:
        """Return how many candidates ITM orders among so many pictures."""
        return self.rerank_many if pictures > MANY else self.rerank


MANY = 2_000
"""Flickr30k's splits have 1,000 and 1,014 pictures, COCO's 5,000."""
PROTOCOLS = {
    "official": Protocol(rerank=128, rerank_many=256, image_size=384, max_tokens=30),
    "fast": Protocol(rerank=16, rerank_many=16, image_size=None, max_tokens=None),
}
"""`official`: the published k_test, resolution and length of captions. `fast`: what training watches itself by."""


@dataclass(frozen=True)
class Ranking:
    """What each of Q queries found."""

    rank: Tensor
    """(Q,) int64 place of the first right answer, 0 is best."""
    top: Tensor
    """(Q, at most max(10, rerank)) int64 the answers in order: numbers of captions or of pictures."""

    def measures(self) -> dict[str, float]:
        """Return recall at 1, 5 and 10 in percent, mean and median rank counted from 1."""
        recall = {f"r{k}": 100 * float((self.rank < k).double().mean()) for k in RECALL_AT}
        place = (self.rank + 1).double()
        return {**recall, "mean_rank": float(place.mean()), "median_rank": float(place.median())}


@dataclass(frozen=True)
class RetrievalResult:
    """Rankings by `itc/DIRECTION` and, when re-ranked, `itm/DIRECTION`."""

    rankings: dict[str, Ranking]
    ceilings: dict[str, float]
    """Percent that nobody can exceed, by `DIRECTION/rK`: captions with the same tokens but of different pictures cannot
    be told apart, and equal scores are ordered as the captions are."""
    chance: dict[str, float]
    """Recall at 1 of a random order in percent, by DIRECTION."""
    pictures: int
    captions: int
    rerank: int
    """Candidates of each query that ITM ordered."""

    def measures(self) -> dict[str, float]:
        """Return every number under one flat name, such as `itm/text_to_image/r1`."""
        found = {f"{key}/{name}": v for key, ranking in self.rankings.items() for name, v in ranking.measures().items()}
        return {
            **found,
            **{f"ceiling/{key}": value for key, value in self.ceilings.items()},
            **{f"chance/{key}/r1": value for key, value in self.chance.items()},
            "pictures": self.pictures,
            "captions": self.captions,
        }


@torch.no_grad()
def retrieve(
    model: Simla,
    batches: Iterable[Mapping[str, Any]],
    *,
    rerank: int | Protocol = 16,
    batch_size: int = 256,
    progress: bool = False,
) -> RetrievalResult:
    """Rank all captions for each picture and all pictures for each caption.

    Args:
        model: in eval mode, on the device to use.
        batches: `image` (B, 3, S, S), `input_ids` and `text_mask` (B, L), `image_id` (B,), as in types.Batch: a row per
            caption. Rows that share an image_id are captions of one picture, which is encoded the first time.
        rerank: candidates of each query that ITM orders (the paper takes 256 on COCO, 128 on Flickr30k); those behind
            them keep ITC's order. 0: ITC only. A protocol: as it says for so many pictures.
        batch_size: queries compared, captions encoded and pairs re-ranked at a time. A chunk of similarities has
            batch_size x max(I, T) numbers; the whole matrix is never made.
        progress: show a bar for encoding and for re-ranking.
    """
    if model.training:
        raise ValueError("retrieve needs model.eval(): dropout would make the ranking random")
    gallery = encode(model, batches, keep_tokens=rerank != 0, batch_size=batch_size, progress=progress)
    pictures, captions = len(gallery.image_feature), len(gallery.image_of_caption)
    if isinstance(rerank, Protocol):
        rerank = rerank.candidates(pictures)
    by_picture, by_caption = torch.arange(pictures), gallery.image_of_caption
    rankings = {
        "itc/image_to_text": rank_by_similarity(
            gallery.image_feature, gallery.text_feature, by_picture, by_caption, rerank, batch_size,
            key_row=gallery.text_of_caption,
        ),
        "itc/text_to_image": rank_by_similarity(
            gallery.text_feature.index_select(0, gallery.text_of_caption), gallery.image_feature,
            by_caption, by_picture, rerank, batch_size,
        ),
    }  # fmt: skip
    if rerank:
        first = [rankings[f"itc/{direction}"].top[:, :rerank] for direction in DIRECTIONS]
        scores = match_candidates(model, gallery, *first, batch_size=batch_size, progress=progress)
        groups = ((by_picture, by_caption), (by_caption, by_picture))
        for direction, score, (query_group, key_group) in zip(DIRECTIONS, scores, groups, strict=True):
            rankings[f"itm/{direction}"] = reorder(rankings[f"itc/{direction}"], score, query_group, key_group)
    chance = {"image_to_text": 100 / pictures, "text_to_image": 100 / pictures}  # T / I captions are right among T
    return RetrievalResult(rankings, ceilings(gallery), chance, pictures, captions, rerank)


def rank_by_similarity(
    queries: Tensor,
    keys: Tensor,
    query_group: Tensor,
    key_group: Tensor,
    keep: int = 0,
    chunk: int = 256,
    key_row: Tensor | None = None,
) -> Ranking:
    """Order the keys of each query by inner product; equal ones stay in their order.

    Args:
        queries: (Q, E). keys: (U, E).
        query_group: (Q,) and key_group (T,): a key is right when its group is the query's.
        keep: answers kept per query, 10 at least.
        chunk: queries at a time.
        key_row: (T,) int64 the row of keys that each answer has; None: U = T, its own.
    """
    keep, ranks, top = max(keep, RECALL_AT[-1]), [], []
    for rows, groups in zip(queries.split(chunk), query_group.split(chunk), strict=True):
        similarity = rows @ keys.T
        if key_row is not None:  # after the product: equal keys must not differ by rounding
            similarity = similarity.index_select(1, key_row)
        order = similarity.argsort(dim=-1, descending=True, stable=True)
        ranks.append(_first_right(order, groups, key_group)[0])
        top.append(order[:, :keep].clone())
    return Ranking(torch.cat(ranks), torch.cat(top))


def reorder(ranking: Ranking, scores: Tensor, query_group: Tensor, key_group: Tensor) -> Ranking:
    """Order the first K answers by scores (Q, K), equal ones as they were; those behind them keep their places."""
    count = scores.shape[1]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    first = ranking.top[:, :count].gather(1, order)
    place, found = _first_right(first, query_group, key_group)
    return Ranking(torch.where(found, place, ranking.rank), torch.cat([first, ranking.top[:, count:]], dim=1))


def _first_right(answers: Tensor, query_group: Tensor, key_group: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of the first right answer in (Q, K), and whether there is one."""
    right = key_group[answers] == query_group[:, None]
    return right.int().argmax(-1), right.any(-1)


def match_candidates(
    model: Simla, gallery: Gallery, captions: Tensor, pictures: Tensor, *, batch_size: int, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Score the candidate captions (I, K) of each picture and the candidate pictures (T, K) of each caption by ITM.

    A pair that both directions ask for is scored once. Pairs are taken picture by picture, whose keys and values are
    then projected once for all its captions of a batch. Ranks score a share each; every rank must call.
    """
    texts, device = len(gallery.text_feature), next(model.parameters()).device
    # on another card a last bit can order two candidates otherwise, and ranks would not share out the same pairs
    captions, pictures = of_first_rank(captions, device), of_first_rank(pictures, device)
    by_image = torch.arange(len(captions))[:, None] * texts + gallery.text_of_caption[captions]
    by_text = pictures * texts + gallery.text_of_caption[:, None]
    pairs, where = torch.cat([by_image.flatten(), by_text.flatten()]).unique(return_inverse=True)
    count = -(-len(pairs) // world_size())
    own = pairs[(rank() * count + torch.arange(count)).clamp(max=len(pairs) - 1)]  # as many on every rank
    scores = match_scores(model, gallery, own // texts, own % texts, batch_size=batch_size, progress=progress)
    scores = gather_by_rank(scores.to(device)).cpu()
    wanted = scores[where].split([by_image.numel(), by_text.numel()])
    return wanted[0].view_as(by_image), wanted[1].view_as(by_text)


def ceilings(gallery: Gallery) -> dict[str, float]:
    """Return the highest possible recall in percent by `DIRECTION/rK` (see RetrievalResult.ceilings)."""
    texts, images = gallery.text_of_caption.tolist(), gallery.image_of_caption.tolist()
    said_of: dict[int, Counter[int]] = defaultdict(Counter)
    ahead: dict[int, int] = {}
    for text, image in zip(texts, images, strict=True):
        others = said_of[text].total() - said_of[text][image]  # same words, earlier, of other pictures
        ahead[image] = min(ahead.get(image, others), others)
        said_of[text][image] += 1
    found = {}
    for k in RECALL_AT:
        found[f"image_to_text/r{k}"] = 100 * sum(others < k for others in ahead.values()) / len(ahead)
        # every query of the group gets the same pictures: best are those it was said of most often
        best = sum(count for said in said_of.values() for _, count in said.most_common(k))
        found[f"text_to_image/r{k}"] = 100 * best / len(texts)
    return found


def sharded(
    samples: Samples, skipped: Counter[str], batch_size: int = 16, workers: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield batches for `retrieve` of all captions of shards' samples, batch_size pictures each.

    skipped: gets how many samples could not be used, by reason.
    """
    known: dict[Any, int] = {}
    for chunk in DataLoader(samples, batch_size, collate_fn=list, num_workers=workers):
        skipped.update(sample.reason for sample in chunk if sample.reason)
        usable = [sample for sample in chunk if not sample.reason]
        if not usable:
            continue
        names = [sample.image_id or sample.place for sample in usable]  # keys may start anew in every shard
        image_id = torch.tensor([known.setdefault(name, len(known)) for name in names])
        count = torch.tensor([len(sample.tokens) for sample in usable])
        rows = [torch.tensor(ids) for sample in usable for ids in sample.tokens]
        lengths = torch.tensor([len(row) for row in rows])
        yield {
            "image": torch.stack([sample.image for sample in usable if sample.image is not None]).repeat_interleave(
                count, dim=0
            ),
            "input_ids": pad_sequence(rows, batch_first=True),
            "text_mask": torch.arange(int(lengths.max())) < lengths[:, None],
            "image_id": image_id.repeat_interleave(count),
        }


def annotated(rows: Annotations, processor: SimlaProcessor, batch_size: int = 16) -> Iterator[dict[str, Any]]:
    """Yield batches for `retrieve` of rows as Retrieval.rows makes them: `image`, `image_id` and one `caption`.

    Batches have batch_size pictures with all their captions. ValueError names a picture that cannot be read.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    first: dict[str, str] = {}
    for row in rows.entries:
        captions[row["image_id"]].append(row["caption"])
        first.setdefault(row["image_id"], row["image"])
    names = list(first)
    for start in range(0, len(first), batch_size):
        chunk = names[start : start + batch_size]
        count = torch.tensor([len(captions[name]) for name in chunk])
        pictures = [rows.picture(first[name]) for name in chunk]
        inputs = processor(pictures, [caption for name in chunk for caption in captions[name]])
        yield {
            "image": inputs["pixel_values"].repeat_interleave(count, dim=0),
            "input_ids": inputs["input_ids"],
            "text_mask": inputs["attention_mask"].bool(),
            "image_id": torch.arange(start, start + len(chunk)).repeat_interleave(count),
        }
