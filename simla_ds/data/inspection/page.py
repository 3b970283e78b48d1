"""The report as a page to look at, a sheet of pictures, and a few lines for the terminal."""

from __future__ import annotations

import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from simla_ds.data.inspection.look import TILE, Finding

_GAP, _LINE, _LINES = 12, 15, 4
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c1c1c }
h2 { margin-top: 2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bars { display: flex; align-items: flex-end; height: 9rem; gap: 1px; margin-top: 1rem }
.bars div { flex: 1 1 0; max-width: 3rem; background: #4477aa; min-height: 1px }
.axis { display: flex; justify-content: space-between; color: #666; border-top: 1px solid #999 }
.stop { background: #fbe3e4; border-left: 4px solid #c0392b; padding: .5rem 1rem }
.warning { background: #fdf4dc; border-left: 4px solid #d9a400; padding: .5rem 1rem }
.fine { background: #e6f4e6; border-left: 4px solid #2e8b57; padding: .5rem 1rem }
.columns { display: flex; flex-wrap: wrap; gap: 0 3rem } img { max-width: 100% }
"""


def lines(report: Mapping[str, Any]) -> list[str]:
    """Return the report in a few lines for the terminal."""
    pictures, captions, twice = report["pictures"], report["captions"], report["duplicates"]
    shards, sides = report["shards"], f"shorter side {_range(pictures['shorter_side'])} px"
    said = [
        f"{shards['count']:,} shards, {_gigabytes(report)}: {report['samples']:,} samples, {report['usable']:,} usable",
        f"pictures: {_named(pictures['formats'])}; {sides}, {_range(pictures['kilobytes'])} KiB",
        f"captions: {captions['count']:,}; {report['vocabulary']['words']:,} different words",
        f"twice: {twice['keys']:,} keys, {twice['pictures']:,} pictures, {twice['captions']:,} captions",
    ]
    if captions["tokens"]:
        said[2] += f"; {captions['cut']:,} longer than data.max_tokens, {captions['unknown_tokens']:,} [UNK]"
    if report["bad"]:
        said.append(f"passed over: {_named(report['bad'])}")
    said += [f"  {bad['sample']}: {bad['reason']}" for bad in report["bad_samples"][:10]]
    if len(report["bad_samples"]) > 10:
        said.append("  ... (--out DIR lists them)")
    said += [f"note: {warning}" for warning in report["warnings"]]
    return said + [f"training would stop: {stop}" for stop in report["stops"]]


def page(report: Mapping[str, Any], sheet: str) -> str:
    """Return the report as one HTML page. sheet: name of the contact sheet beside it."""
    captions, pictures, twice = report["captions"], report["pictures"], report["duplicates"]
    boxes = [_box("stop", f"Training would stop: {stop}") for stop in report["stops"]]
    boxes = boxes or [_box("fine", "Nothing here would stop training.")]
    boxes += [_box("warning", warning) for warning in report["warnings"]]
    bad = [(bad["sample"], bad["reason"]) for bad in report["bad_samples"]]
    vocabulary, shards = report["vocabulary"], f"{report['shards']['count']:,} shards, {_gigabytes(report)}"
    again = f"{twice['keys']:,} keys that were there before, {twice['pictures']:,} pictures under another image id."
    body = [
        f"<h1>{_escape(report['source'])}</h1>",
        *boxes,
        f"<p>{shards}: {report['samples']:,} samples, <b>{report['usable']:,}</b> usable.</p>",
        "<h2>Passed over</h2>",
        _table(report["bad"].items()) if bad else "<p>Nothing.</p>",
        f"<details><summary>the first {len(bad):,}</summary>{_table(bad)}</details>" if bad else "",
        "<h2>Some of it</h2>",
        f'<img src="{_escape(sheet)}" alt="contact sheet">' if report["usable"] else "<p>Nothing usable.</p>",
        "<h2>Captions</h2>",
        f"<p>{captions['count']:,} captions, {twice['captions']:,} of them said before.</p>",
        _bars("words per caption, cleaned as in training", captions["words"]),
        _bars(f"tokens per caption; {captions['cut']:,} will be cut", captions["tokens"]),
        '<div class="columns"><div>',
        f"<h3>Words</h3><p>{vocabulary['words']:,} different, {vocabulary['seen_once']:,} once</p>",
        _table(list(vocabulary["commonest"].items())[:20]),
        "</div><div><h3>Said most often</h3>",
        _table(twice["commonest_captions"].items()),
        "</div></div>",
        "<h2>Pictures</h2>",
        _table(pictures["formats"].items()),
        _quantile_table(pictures),
        f"<h2>Duplicates</h2><p>{again}</p>",
        _table(twice["same_picture"][:100]),
    ]
    title = f"<title>simla inspect {_escape(report['source'])}</title>"
    head = f'<meta charset="utf-8">{title}<style>{_STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n"


def contact_sheet(shown: Sequence[Finding], columns: int = 6) -> Image.Image:
    """Return thumbnails with key and first caption."""
    high = TILE + _GAP + _LINES * _LINE
    rows = max(1, -(-len(shown) // columns))
    sheet = Image.new("RGB", (_GAP + columns * (TILE + _GAP), _GAP + rows * (high + _GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, finding in enumerate(shown):
        left, top = _GAP + number % columns * (TILE + _GAP), _GAP + number // columns * (high + _GAP)
        picture = Image.open(io.BytesIO(finding.thumbnail))
        sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
        said = [finding.key[-30:], *textwrap.wrap(finding.captions[0], 30)][:_LINES]
        for row, line in enumerate(said):
            pen.text((left, top + TILE + 2 + row * _LINE), line, fill="#888" if row == 0 else "black", font=font)
    return sheet


def _bars(title: str, histogram: Mapping[int, int], most: int = 60) -> str:
    """A histogram; what lies beyond `most` goes into the last bar."""
    if not histogram:
        return ""
    counts = [0] * (min(most, max(histogram)) + 1)
    for value, count in histogram.items():
        counts[min(value, most)] += count
    bars = "".join(
        f'<div style="height:{100 * count / max(counts):.1f}%" title="{value}: {count:,}"></div>'
        for value, count in enumerate(counts)
    )
    last = f"{len(counts) - 1}{' and more' if max(histogram) > most else ''}"
    axis = f'<div class="axis"><span>0</span><span>{last}</span></div>'
    return f'<h3>{_escape(title)}</h3><div class="bars">{bars}</div>{axis}'


def _quantile_table(pictures: Mapping[str, Any]) -> str:
    kinds = {"shorter_side": "shorter side, px", "longer_side": "longer side, px", "kilobytes": "file, KiB"}
    names = list(pictures["shorter_side"])
    return _table([("", *names), *((kind, *pictures[name].values()) for name, kind in kinds.items())]) if names else ""


def _table(rows) -> str:
    cells = "\n".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table>{cells}</table>"


def _cell(value: Any) -> str:
    return f'<td class="n">{value:,}</td>' if isinstance(value, int) else f"<td>{_escape(str(value))}</td>"


def _box(kind: str, text: str) -> str:
    return f'<p class="{kind}">{_escape(text)}</p>'


def _escape(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())


def _named(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "none"


def _gigabytes(report: Mapping[str, Any]) -> str:
    return f"{report['shards']['bytes'] / 1e9:.3f} GB"


def _range(found: Mapping[str, int]) -> str:
    return f"{found['least']:,} to {found['most']:,} (median {found['median']:,})" if found else "-"
