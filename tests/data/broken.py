"""A data set with everything that can be wrong, as files and as shards, and what must become of each sample."""

import io
import struct
import tarfile
import zlib
from collections import Counter

import numpy as np
from PIL import Image

from simla_ds.data.shards import index_tar, write_shards


def encoded(image, kind, **options):
    """The picture as a file of a kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(side=60_000):
    """A PNG of a few hundred bytes that says it has side x side pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def broken_samples():
    """Return {key: members} of samples that must be used, and {key: (members, reason)} of those that must not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    jpg = encoded(noise, "JPEG")
    text = {"txt": b"a caption"}
    usable = {
        "cmyk": {"jpg": encoded(noise.convert("CMYK"), "JPEG"), **text},
        "sixteen": {
            "png": encoded(Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70), "PNG"),
            **text,
        },
        "palette": {"png": encoded(noise.quantize(16), "PNG", transparency=3), **text},
        "animated": {"gif": encoded(noise, "GIF", save_all=True, append_images=[noise.rotate(90)]), **text},
        "rotated": {"jpg": encoded(noise, "JPEG", exif=exif), **text},
        "misnamed": {"jpg": encoded(noise, "PNG"), **text},
        "long": {"jpg": jpg, "txt": b"word " * 10_000},
        "emoji": {"jpg": jpg, "txt": "\N{DOG FACE}\N{CAT FACE}\N{MOUSE FACE}".encode()},
        "special": {"jpg": jpg, "txt": b"the [MASK] and the [SEP] [CLS] [PAD]"},
        "list": {"jpg": jpg, "json": b'{"caption": ["one", "", "two"]}'},
        "../../climbing": {"jpg": jpg, **text},
        "/tmp/absolute": {"jpg": jpg, **text},
    }
    unusable = {
        "truncated": ({"jpg": jpg[: len(jpg) // 2], **text}, "picture truncated"),
        "zero": ({"jpg": b"", **text}, "picture empty"),
        "html": ({"jpg": b"<html></html>" * 9, **text}, "picture unreadable"),
        "bomb": ({"png": encoded(Image.new("1", (9_000, 9_000)), "PNG"), **text}, "picture too large"),
        "liar": ({"png": bomb(), **text}, "picture too large"),
        "alone": ({"jpg": jpg, "cls": b"3"}, "caption missing"),
        "none": ({"jpg": jpg, "json": b'{"caption": null}'}, "caption missing"),
        "empty": ({"jpg": jpg, "txt": b""}, "caption empty"),
        "blank": ({"jpg": jpg, "json": b'{"caption": ["", " ... "]}'}, "caption empty"),
        "huge": ({"jpg": jpg, "txt": b"word " * 1_000_000}, "caption too large"),
        "latin": ({"jpg": jpg, "txt": "Gr\u00f6\u00dfe".encode("latin-1")}, "caption not UTF-8"),
        "half": ({"jpg": jpg, "json": b'{"caption": "\\ud83d"}'}, "caption not UTF-8"),
        "number": ({"jpg": jpg, "json": b'{"caption": 5}'}, "caption not text"),
        "blind": ({"txt": b"no picture"}, "picture missing"),
        "json": ({"jpg": jpg, "json": b"{"}, "caption json broken"),
        "digits": ({"jpg": jpg, "json": b'{"caption": "a dog", "width": ' + b"1" * 5000 + b"}"}, "caption json broken"),
    }
    return usable, unusable


def broken_shards(folder):
    """Write them as shards, with broken tars; return the keys that must be used and the skips by reason."""
    usable, unusable = broken_samples()
    samples = [*usable.items(), *((key, members) for key, (members, _) in unusable.items())]
    write_shards(samples, folder, shard_size=5)
    jpg = usable["rotated"]["jpg"]
    cut = write_shards([(f"cut{i}", {"jpg": jpg, "txt": b"a caption"}) for i in range(4)], folder / "cut", 10)[0]
    whole = cut.read_bytes()
    offset, size = index_tar(str(cut)).sample(2)["jpg"]
    (folder / "x-cut.tar").write_bytes(whole[: offset + size // 2])
    with tarfile.open(folder / "x-empty.tar", "w"):
        pass
    (folder / "x-none.tar").write_bytes(b"<html>404</html>" * 100)
    with tarfile.open(folder / "x-links.tar", "w") as tar:
        for name in ("passwd.jpg", "passwd.txt"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    reasons = Counter(reason for _, reason in unusable.values())
    return {*usable, "cut0", "cut1"}, reasons + Counter({"shard truncated": 1, "shard empty": 2, "shard unreadable": 1})
