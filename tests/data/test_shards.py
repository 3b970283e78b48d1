"""Shards: reproducible bytes, an index that agrees with tarfile, and tars that are broken on purpose."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from simla_ds.data.shards import (
    SelectionOutdated,
    ShardFiles,
    find_shards,
    index_tar,
    load_index,
    open_shard,
    store_selection,
    write_shards,
)


def pairs(count):
    return [(f"{i:04d}", {"jpg": b"picture%d" % i * 100, "json": b'{"caption": "%d"}' % i}) for i in range(count)]


def read_all(shard):
    files = ShardFiles([shard])
    return [(shard.key(i), files.read(0, i)) for i in range(len(shard))]


def make_tar(path, members, tar_format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_what_is_written_is_read_and_equal_samples_give_equal_bytes(tmp_path):
    first = write_shards(pairs(25), tmp_path / "a", shard_size=10)
    again = write_shards(pairs(25), tmp_path / "b", shard_size=10)
    assert [path.name for path in first] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    shards = [open_shard(path) for path in find_shards(str(tmp_path / "a"))]
    assert [len(shard) for shard in shards] == [10, 10, 5]
    assert [sample for shard in shards for sample in read_all(shard)] == pairs(25)


def test_a_generator_that_fails_leaves_only_whole_shards(tmp_path):
    def failing():
        yield from pairs(15)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(failing(), tmp_path, shard_size=10)
    assert os.listdir(tmp_path) == ["shard-000000.tar"]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_agrees_with_tarfile(tmp_path, tar_format):
    long_name = "photos/" + "x" * 90 + "/" + "y" * 40  # needs ustar's prefix, GNU's @LongLink or a pax header
    members = [
        (f"{long_name}{i}.{extension}", bytes([i]) * size)
        for i in range(3)
        for extension, size in (("jpg", 700), ("txt", 0))
    ]
    members.append(("drei.kinder.de.jpg", b"dots"))
    path = make_tar(tmp_path / "a.tar", members, tar_format)
    shard = index_tar(path)
    assert shard.problem == ""
    with tarfile.open(path) as tar:
        expected = {(info.name, info.offset_data, info.size) for info in tar}
    assert {
        (f"{shard.key(i)}.{extension}", *place)
        for i in range(len(shard))
        for extension, place in shard.sample(i).items()
    } == expected


def test_umlauts_in_names_survive(tmp_path):
    path = make_tar(
        tmp_path / "a.tar", [("größe.jpg", b"1"), ("größe.txt", b"2"), ("犬.jpg", b"3")], tarfile.PAX_FORMAT
    )
    shard = index_tar(path)
    assert [shard.key(i) for i in range(len(shard))] == ["größe", "犬"]


def test_the_stored_index_is_used_until_the_tar_changes(tmp_path):
    path = str(write_shards(pairs(4), tmp_path, 10)[0])
    assert read_all(open_shard(path)) == pairs(4)
    sidecar = tmp_path / "shard-000000.tar.index.npz"
    stored = sidecar.read_bytes()
    assert read_all(open_shard(path)) == pairs(4)
    assert sidecar.read_bytes() == stored
    os.replace(write_shards(pairs(6), tmp_path / "new", 10)[0], path)
    assert read_all(open_shard(path)) == pairs(6)
    sidecar.write_bytes(stored[:100])
    assert read_all(open_shard(path)) == pairs(6)
    assert find_shards(str(tmp_path)) == [path]  # neither the index nor a leftover is taken for a shard


def test_a_choice_of_samples_outlives_a_copy_that_changes_times(tmp_path):
    path = str(write_shards(pairs(4), tmp_path / "a", 10)[0])
    store_selection(index_tar(path), [1, 3], "without those of the test set")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    copy = str(tmp_path / "b" / "shard-000000.tar")
    os.utime(copy, (1, 1))
    for _ in range(2):  # then the index has the copy's time
        assert read_all(open_shard(copy)) == pairs(4)[1::2]
        assert open_shard(copy).note == "without those of the test set"


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda tar: tar + bytes(512), "bytes, had"),
        (lambda tar: tar.replace(b"0003.jpg", b"0004.jpg").replace(b"0003.json", b"0004.json"), "1 of the 2 chosen"),
    ],
)
def test_a_choice_of_samples_is_not_lost_with_a_tar_that_changes(tmp_path, change, difference):
    path = write_shards(pairs(4), tmp_path, 10)[0]
    store_selection(index_tar(str(path)), [1, 3], "without those of the test set")
    sidecar = tmp_path / "shard-000000.tar.index.npz"
    stored = sidecar.read_bytes()
    path.write_bytes(fixed_checksums(change(path.read_bytes())))
    os.utime(path, (1, 1))
    with pytest.raises(SelectionOutdated, match=rf"shard-000000\.tar is not the tar .*{difference}") as error:
        open_shard(str(path))
    assert f"delete {sidecar}" in str(error.value)
    assert sidecar.read_bytes() == stored


def fixed_checksums(tar):
    """The same tar after names in its headers were changed."""
    changed = bytearray(tar)
    for start in range(0, len(changed), 512):
        if changed[start + 257 : start + 262] == b"ustar":
            changed[start + 148 : start + 156] = b" " * 8
            changed[start + 148 : start + 156] = b"%06o\0 " % sum(changed[start : start + 512])
    return bytes(changed)


def test_a_folder_that_cannot_be_written_does_without_the_stored_index(tmp_path, monkeypatch):
    path = str(write_shards(pairs(4), tmp_path, 10)[0])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr("simla_ds.data.shards.np.savez", refuse)
    assert read_all(open_shard(path)) == pairs(4)
    assert os.listdir(tmp_path) == ["shard-000000.tar"]


def test_a_tar_cut_anywhere_gives_exactly_the_whole_samples_before_the_cut(tmp_path):
    path = write_shards(pairs(3), tmp_path, 10)[0]
    whole = path.read_bytes()
    shard = index_tar(str(path))
    ends = [max(offset + size for offset, size in shard.sample(i).values()) for i in range(3)]
    for cut in range(0, ends[-1] + 512, 171):  # 171 is odd to 512: cuts in headers, data and padding
        path.write_bytes(whole[:cut])
        cut_shard = index_tar(str(path))
        assert cut_shard.problem == "shard truncated"
        assert read_all(cut_shard) == pairs(3)[: sum(end <= cut for end in ends)], cut


def test_a_sample_without_caption_before_the_cut_is_not_used(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("0.jpg", b"p"), ("0.txt", b"t"), ("1.jpg", b"p"), ("1.txt", b"t")])
    with open(path, "r+b") as file:
        file.truncate(3 * 1024)  # between 1.jpg and 1.txt
    assert [key for key, _ in read_all(index_tar(path))] == ["0"]


def test_a_sample_whose_json_is_cut_is_not_used_with_its_text_alone(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("0.jpg", b"p"), ("0.txt", b"t"), ("0.json", b"{}" * 300)])
    with open(path, "r+b") as file:
        file.truncate(2 * 1024 + 700)  # inside 0.json
    assert read_all(index_tar(path)) == []


def test_a_tar_that_is_none_or_empty_says_so(tmp_path):
    empty = make_tar(tmp_path / "empty.tar", [])
    assert index_tar(empty).problem == "shard empty"
    (tmp_path / "zero.tar").write_bytes(b"")
    assert index_tar(str(tmp_path / "zero.tar")).problem == "shard truncated"
    (tmp_path / "text.tar").write_bytes(b"<html>404</html>" * 100)
    assert index_tar(str(tmp_path / "text.tar")).problem == "shard unreadable"
    damaged = bytearray(write_shards(pairs(3), tmp_path / "d", 10)[0].read_bytes())
    offset, _ = index_tar(str(tmp_path / "d" / "shard-000000.tar")).sample(1)["jpg"]
    damaged[offset - 512] ^= 1  # one bit in the second sample's header
    (tmp_path / "bit.tar").write_bytes(damaged)
    shard = index_tar(str(tmp_path / "bit.tar"))
    assert (shard.problem, read_all(shard)) == ("shard unreadable", pairs(1))


def test_links_folders_and_names_that_climb_have_no_effect(tmp_path):
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "0.png"), (tarfile.LNKTYPE, "0.gif"), (tarfile.DIRTYPE, "folder")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("../../up.jpg", "../../up.txt", "/etc/root.jpg", "/etc/root.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    shard = index_tar(str(path))
    assert read_all(shard) == [
        ("../../up", {"jpg": b"abc", "txt": b"abc"}),
        ("/etc/root", {"jpg": b"abc", "txt": b"abc"}),
    ]
    assert os.listdir(tmp_path) == ["in"]


def test_shards_are_found_by_folder_file_glob_and_braces(tmp_path):
    paths = [str(path) for path in write_shards(pairs(30), tmp_path, 10)]
    assert find_shards(str(tmp_path)) == paths
    assert find_shards(paths[1]) == paths[1:2]
    assert find_shards(f"{tmp_path}/shard-*.tar") == paths
    assert find_shards(f"{tmp_path}/shard-{{000000..000002}}.tar") == paths
    assert find_shards(f"{tmp_path}/{{shard-000002,shard-000000}}.tar") == [paths[0], paths[2]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "matches no shards"),
        ("{folder}/none", "data.train='{folder}/none' matches no shards"),
        ("{folder}/shard-{{000000..000009}}.tar", "8 of 10 shards are missing, first {folder}/shard-000002.tar"),
        ("pipe:cat {folder}/shard-000000.tar", "only training and its evaluation fetch shards"),
        ("https://example.org/a.tar", "only training and its evaluation fetch shards"),
    ],
)
def test_a_spec_that_matches_nothing_is_one_clear_line(tmp_path, spec, message):
    write_shards(pairs(20), tmp_path, 10)
    with pytest.raises(ValueError, match=r"data\.train") as error:
        find_shards(spec.format(folder=tmp_path))
    assert message.format(folder=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_huge_member_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("simla_ds.data.shards.MAX_MEMBER_BYTES", 10)
    path = make_tar(tmp_path / "a.tar", [("0.jpg", b"x" * 11), ("0.txt", b"x" * 10)])
    assert read_all(index_tar(path)) == [("0", {"jpg": None, "txt": b"x" * 10})]


def test_a_header_that_leads_back_is_damage(tmp_path):
    whole = make_tar(tmp_path / "whole.tar", [("a.jpg", b"x" * 600), ("a.txt", b"a dog")])
    header = bytearray(Path(whole).read_bytes())
    header[124:136] = b"-0000001000\0"  # to the header itself
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:512]) + 8 * 32)
    (tmp_path / "back.tar").write_bytes(header)
    assert index_tar(str(tmp_path / "back.tar")).problem == "shard unreadable"


@pytest.mark.parametrize("size", ["-1024", "abc", "9" * 5000])
def test_a_pax_size_that_is_none_is_damage(tmp_path, size):
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 4, {"size": size}
        tar.addfile(info, io.BytesIO(b"jpeg"))
    assert index_tar(str(tmp_path / "pax.tar")).problem == "shard unreadable"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("members", lambda members: np.add(members, [9, 0, 0])),
        ("members", lambda members: members * [1, -1, 1]),
        ("members", lambda members: members.astype(float)),
        ("name_ends", lambda ends: ends[::-1]),
        ("name_ends", lambda ends: ends + 100),
        ("member_ends", lambda ends: ends[:-1]),
    ],
)
def test_a_stored_index_that_cannot_be_one_is_read_anew(tmp_path, name, change):
    (path,) = write_shards(pairs(5), tmp_path, shard_size=5)
    expected = read_all(open_shard(str(path)))
    sidecar = tmp_path / f"{path.name}.index.npz"
    with np.load(sidecar) as stored:
        arrays = dict(stored)
    np.savez(sidecar, **{**arrays, name: change(arrays[name])})
    assert read_all(open_shard(str(path))) == expected
    np.savez(sidecar, **arrays)
    assert load_index(str(sidecar), str(path)) is not None
