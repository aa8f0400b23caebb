"""Where images come from: the same images of every kind of source, and errors that say what to do.

Tests vae_export/dataset/sources.py, vae_export/dataset/tables.py.
"""

import contextlib
import io
import json
import os
import socket
import tarfile
from typing import Any

import pytest

from runtimes import ConfigError
from tests.helpers.dataset_samples import encode, image_bytes, make_folder

pa = pytest.importorskip("pyarrow", reason="pip install 'vae-export[dataset]'")

from pyarrow import parquet  # noqa: E402

from vae_export.dataset.sources import open_source  # noqa: E402

PATHS = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
IMAGES = [image_bytes(number) for number in range(7)]


def make_tar(path, images, first=0):
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(images, start=first):
            for suffix, content in (("png", data), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def make_folder_source(place):
    for number, data in enumerate(IMAGES):
        (place / f"{number}.png").write_bytes(data)
    (place / "notes.txt").write_text("not an image")
    (place / ".hidden.png").write_bytes(IMAGES[0])
    return place


def make_webdataset(place):
    make_tar(place / "a-000.tar", IMAGES[:4])
    make_tar(place / "a-001.tar", IMAGES[4:])
    return place


def make_parquet_of_bytes(place):
    table = pa.table({"caption": ["x"] * 7, "image": pa.array(IMAGES, pa.binary())})
    parquet.write_table(table, place / "data.parquet", row_group_size=3)
    return place / "data.parquet"


def make_parquet_of_structs(place):
    for name, part in (("0.parquet", IMAGES[:3]), ("1.parquet", IMAGES[3:])):
        rows = [{"image": {"bytes": data, "path": "x.png"}} for data in part]
        parquet.write_table(pa.Table.from_pylist(rows), place / name)
    return place


def make_datasets_directory(place):
    """As `datasets.Dataset.save_to_disk` writes it."""
    table = pa.Table.from_pylist([{"image": {"bytes": data, "path": None}, "label": 1} for data in IMAGES])
    with pa.ipc.new_stream(place / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train", "_fingerprint": "0"}
    (place / "state.json").write_text(json.dumps(state))
    (place / "dataset_info.json").write_text("{}")
    return place


@pytest.mark.parametrize(
    ("make", "first_id"),
    [
        (make_folder_source, "0.png"),
        (make_webdataset, "a-000/0000.png"),
        (make_parquet_of_bytes, "data.parquet:0"),
        (make_parquet_of_structs, "0.parquet:0"),
        (make_datasets_directory, "data-00000-of-00001.arrow:0"),
    ],
)
def test_every_source_gives_its_images_in_order_with_ids_of_their_own(make, first_id, tmp_path):
    source = open_source(make(tmp_path))
    items = sorted(source.items(), key=lambda item: (item.file, item.at))
    assert [source.read(item) for item in items] == IMAGES
    assert items[0].id == first_id and len({item.id for item in items}) == 7


def test_a_pattern_a_single_tar_and_a_relative_path(tmp_path, monkeypatch):
    make_webdataset(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert [len(list(open_source(path).items())) for path in ("a-*.tar", "a-000.tar", ".")] == [7, 4, 7]


def test_ids_may_come_from_a_column(tmp_path):
    table = pa.table({"key": [f"k{number}" for number in range(7)], "png": pa.array(IMAGES, pa.binary())})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=2)
    source = open_source(tmp_path, id_column="key")
    items = list(source.items())
    assert [item.id for item in items] == [f"k{number}" for number in range(7)]
    assert source.read(items[5]) == IMAGES[5]


def test_two_files_that_differ_in_their_suffix_are_two_images(tmp_path, tiny_bundle):
    from runtimes.latents import LatentDataset

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(image_bytes(0))
    (tmp_path / "in" / "a.jpg").write_bytes(image_bytes(1, format="JPEG"))
    encode(tmp_path / "in", tiny_bundle, tmp_path / "out")
    assert [entry.id for entry in LatentDataset(tmp_path / "out")] == ["a.jpg", "a.png"]


@pytest.mark.parametrize("make", [make_webdataset, make_parquet_of_structs, make_datasets_directory])
def test_latents_do_not_depend_on_the_kind_of_source(make, tmp_path, tiny_bundle):
    """The same images, encoded in the same order: the same bits."""
    from runtimes.latents import LatentDataset

    found = []
    for number, build in enumerate((make_folder_source, make)):
        place = tmp_path / str(number)
        place.mkdir()
        encode(build(place), tiny_bundle, tmp_path / f"out{number}", workers=2 if number else 0)
        found.append([entry.latents.tobytes() for entry in LatentDataset(tmp_path / f"out{number}")])
    assert found[0] == found[1]


def test_names_that_are_not_unicode(tmp_path):
    name = b"caf\xe9.png"
    try:
        (tmp_path / name.decode(errors="surrogateescape")).write_bytes(IMAGES[0])
    except OSError:
        pytest.skip("this file system takes no such names")
    source = open_source(tmp_path)
    (item,) = source.items()
    assert item.id == "caf\\xe9.png" and source.read(item) == IMAGES[0]


# What is not taken for an image -------------------------------------------------------------------------------------


def listing(path, **options):
    """(ids, {path: reason}) of what a source lists and leaves out."""
    skipped: list[Any] = []
    ids = sorted(item.id for item in open_source(path, **options).items(skipped.append))
    return ids, dict(skipped)


def test_a_link_to_a_file_is_an_image_under_its_own_name(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere.png").write_bytes(IMAGES[0])
    (tmp_path / "in" / "a.png").write_bytes(IMAGES[0])
    (tmp_path / "in" / "b.png").symlink_to("a.png")
    (tmp_path / "in" / "c.png").symlink_to("../elsewhere.png")
    os.link(tmp_path / "elsewhere.png", tmp_path / "in" / "d.png")
    assert listing(tmp_path / "in") == (["a.png", "b.png", "c.png", "d.png"], {})


def test_images_below_links_to_folders_are_listed(tmp_path):
    make_folder(tmp_path / "elsewhere", 4)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "link").symlink_to(tmp_path / "elsewhere")
    expected = [f"sub/link/{name}" for name in ("000.png", "001.png", "002.png", "deep/er/003.png")]
    assert listing(tmp_path / "in") == (expected, {})
    (tmp_path / "root").symlink_to(tmp_path / "in")
    assert listing(tmp_path / "root") == (expected, {})


def test_loops_of_links_end_and_are_listed(tmp_path):
    make_folder(tmp_path / "in", 4)
    (tmp_path / "in" / "self").symlink_to(".")
    (tmp_path / "in" / "deep" / "up").symlink_to("..")
    (tmp_path / "in" / "deep" / "er" / "root").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "circle").symlink_to("circle")
    (tmp_path / "in" / "circle.png").symlink_to("circle.png")
    ids, skipped = listing(tmp_path / "in")
    assert ids == ["000.png", "001.png", "002.png", "circle.png", "deep/er/003.png"]
    folder = "a folder that is read under another path"
    assert skipped == {"self": folder, "deep/up": folder, "deep/er/root": folder, "circle": "a broken link"}


def test_a_folder_that_several_links_lead_to_is_read_once_under_the_first(tmp_path):
    """Two folders with links to each other, and a link to the inside of one of them."""
    for name in ("x", "y"):
        make_folder(tmp_path / name, 1)
    (tmp_path / "x" / "y").symlink_to(tmp_path / "y")
    (tmp_path / "y" / "x").symlink_to(tmp_path / "x")
    (tmp_path / "in").mkdir()
    for name, target in (("2", "x"), ("1", "x"), ("3", "y")):
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
    ids, skipped = listing(tmp_path / "in")
    assert ids == ["1/000.png", "1/y/000.png"] and skipped.keys() == {"2", "3", "1/y/x"}


def test_a_folder_below_the_root_keeps_its_own_path_whatever_links_lead_to_it(tmp_path):
    make_folder(tmp_path / "in" / "z", 1)
    (tmp_path / "in" / "a").symlink_to("z")
    assert listing(tmp_path / "in") == (["z/000.png"], {"a": "a folder that is read under another path"})


def test_hidden_files_and_what_is_in_hidden_folders_are_left_out(tmp_path):
    for name in ("a.png", ".b.png", "._a.png", ".cache/c.png", "deep/.thumbs/d.png", "deep/e.png", ".DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(IMAGES[0])
    ids, skipped = listing(tmp_path)
    assert ids == ["a.png", "deep/e.png"]
    hidden = "hidden: its name begins with a dot"
    assert skipped == dict.fromkeys([".b.png", "._a.png", ".cache", "deep/.thumbs"], hidden) | {
        "*": "not the suffix of an image"
    }
    (tmp_path / ".cache" / "notes.txt").write_text("")
    assert listing(tmp_path / ".cache")[0] == ["c.png"]  # the root may be hidden


def test_fifos_and_sockets_are_not_waited_for(tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "null.png").symlink_to(os.devnull)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(tmp_path / "socket.png"))
        ids, skipped = listing(tmp_path)
    reason = "a FIFO, socket or device, not a regular file"
    assert ids == ["a.png"]
    assert skipped == dict.fromkeys(["pipe.png", "link.png", "null.png", "socket.png"], reason)


def test_a_file_that_becomes_a_fifo_after_the_listing_is_an_error_and_not_waited_for(tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    source = open_source(tmp_path)
    (item,) = source.items()
    (tmp_path / "a.png").unlink()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(OSError, match="FIFO"):
        source.read(item)


def test_a_table_that_names_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    rows = [{"image": {"bytes": None, "path": str(tmp_path / "pipe")}}]
    parquet.write_table(pa.Table.from_pylist(rows).cast(PATHS), tmp_path / "data.parquet")
    source = open_source(tmp_path / "data.parquet")
    with pytest.raises(OSError, match="FIFO"):
        source.read(next(source.items()))


def test_a_fifo_that_is_given_as_the_source_is_refused(tmp_path):
    os.mkfifo(tmp_path / "data.tar")
    for given in ("data.tar", "*.tar"):
        with pytest.raises(ConfigError, match=r"data\.tar is no regular file"):
            open_source(tmp_path / given)


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(tmp_path, tiny_bundle):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(IMAGES[0])
    (tmp_path / "in" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "in" / "gone").symlink_to("nowhere")
    summary = encode(tmp_path / "in", tiny_bundle, tmp_path / "out")
    assert (summary.encoded, summary.failed, summary.skipped) == (1, 1, 1)
    (error,) = parquet.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert error["id"] == "gone.png" and "No such file" in error["reason"]


def test_hidden_links_and_sparse_members_of_tars_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (
            ("./0.png", tarfile.REGTYPE),
            ("./._0.png", tarfile.REGTYPE),
            (".cache/1.png", tarfile.REGTYPE),
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
            ("folder.png", tarfile.DIRTYPE),
            ("0.txt", tarfile.REGTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "0.png"
            tar.addfile(member)
    ids, skipped = listing(tmp_path / "a.tar")
    assert ids == ["a/./0.png"]
    assert skipped == {
        "a/./._0.png": "hidden: its name begins with a dot",
        "a/.cache/1.png": "hidden: its name begins with a dot",
        "a/link.png": "a link in a tar",
        "a/hard.png": "a link in a tar",
        "a/pipe.png": "no regular file in a tar",
        "*.txt": "not the suffix of an image",
    }


def test_of_a_directory_of_tars_only_visible_regular_files_are_read(tmp_path):
    make_webdataset(tmp_path)
    (tmp_path / "._a-000.tar").write_bytes(b"AppleDouble")
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "README.md").write_text("")
    ids, skipped = listing(tmp_path)
    assert len(ids) == 7
    assert skipped == {
        "._a-000.tar": "hidden: its name begins with a dot",
        **dict.fromkeys(["README.md", "folder.tar", "pipe.tar"], "no .tar file"),
        "*.txt": "not the suffix of an image",
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_all_that_is_skipped_is_counted_and_listed(workers, tmp_path, tiny_bundle):
    (tmp_path / "in").mkdir()
    folder = make_folder_source(tmp_path / "in")
    (folder / "more.txt").write_text("")
    (folder / "self").symlink_to(".")
    os.mkfifo(folder / "x.jpg")
    summary = encode(folder, tiny_bundle, tmp_path / "out", workers=workers)
    assert (summary.images, summary.encoded, summary.skipped) == (7, 7, 5)
    assert summary.to_dict()["skipped"] == 5
    rows = parquet.read_table(tmp_path / "out" / "skipped.parquet").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("*.txt", "not the suffix of an image", 2),
        (".hidden.png", "hidden: its name begins with a dot", 1),
        ("self", "a folder that is read under another path", 1),
        ("x.jpg", "a FIFO, socket or device, not a regular file", 1),
    ]
    (folder / "x.jpg").unlink()
    assert encode(folder, tiny_bundle, tmp_path / "out").skipped == 4
    assert len(parquet.read_table(tmp_path / "out" / "skipped.parquet")) == 3


def test_a_source_without_images_says_what_it_skipped(tmp_path, tiny_bundle):
    (tmp_path / "in" / ".cache").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("")
    with pytest.raises(ConfigError, match=r"no images: 1 skipped \(hidden: .*\); 1 skipped \(not the suffix"):
        encode(tmp_path / "in", tiny_bundle, tmp_path / "out")


# What goes wrong ----------------------------------------------------------------------------------------------------


def test_no_images_at_all(tmp_path, tiny_bundle):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no images"):
        encode(tmp_path / "empty", tiny_bundle, tmp_path / "out")


def test_an_id_that_stands_twice(tmp_path, tiny_bundle):
    table = pa.table({"key": ["a", "b", "a"], "image": pa.array(IMAGES[:3], pa.binary())})
    parquet.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(ConfigError, match="'a' is in the source twice"):
        encode(open_source(tmp_path, id_column="key"), tiny_bundle, tmp_path / "out")
    make_tar(tmp_path / "twice.tar", IMAGES[:2])
    with tarfile.open(tmp_path / "twice.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("0000.png"))
    with pytest.raises(ConfigError, match=r"'twice/0000\.png' is in the source twice"):
        encode(open_source(tmp_path / "twice.tar"), tiny_bundle, tmp_path / "out2")


def test_places_where_there_is_nothing_of_use(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"not a directory, \.tar or \.parquet, but x\.zip"):
        open_source(tmp_path / "x.zip")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match="compressed"):
        open_source(tmp_path / "x.tar.gz")
    with pytest.raises(ConfigError, match=r"no format 'lmdb'.*webdataset"):
        open_source(tmp_path, "lmdb")
    with pytest.raises(ConfigError, match=r"no \.parquet files"):
        open_source(tmp_path, "parquet")


def test_two_kinds_side_by_side(tmp_path):
    make_webdataset(tmp_path)
    make_folder(tmp_path, 1)
    with pytest.raises(ConfigError, match="folder and webdataset side by side; say which with --format"):
        open_source(tmp_path)
    assert len(list(open_source(tmp_path, "folder").items())) == 1


def test_files_that_are_not_what_they_are_called(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ConfigError, match=r"bad\.tar cannot be read as an uncompressed tar"):
        list(open_source(tmp_path / "bad.tar").items())
    make_tar(tmp_path / "cut.tar", IMAGES)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:9000])
    with pytest.raises(ConfigError, match=r"cut\.tar cannot be read"):
        list(open_source(tmp_path / "cut.tar").items())
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"bad\.parquet cannot be read"):
        open_source(tmp_path / "bad.parquet")


def test_tables_without_a_column_of_images_name_what_they_have(tmp_path):
    parquet.write_table(pa.table({"url": ["a"], "width": [1]}), tmp_path / "data.parquet")
    with pytest.raises(ConfigError, match=r"--image-column; it has url \(string\), width \(int64\)"):
        open_source(tmp_path)
    with pytest.raises(ConfigError, match=r"no column 'url' of image bytes"):
        open_source(tmp_path, image_column="url")
    two = pa.table({"left": pa.array([b""]), "right": pa.array([b""])})
    parquet.write_table(two, tmp_path / "data.parquet")
    with pytest.raises(ConfigError, match="which column"):
        open_source(tmp_path)
    assert getattr(open_source(tmp_path, image_column="right"), "image_column") == "right"  # noqa: B009
    with pytest.raises(ConfigError, match=r"no column 'id'; it has left, right"):
        open_source(tmp_path, image_column="right", id_column="id")


def test_a_directory_of_several_splits_names_them(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
    with pytest.raises(ConfigError, match=r"give one of them: test, train"):
        open_source(tmp_path)


def test_a_row_without_an_image_is_that_rows_error_alone(tmp_path, tiny_bundle):
    rows = [{"image": {"bytes": IMAGES[0], "path": None}}, {"image": {"bytes": None, "path": None}}, {"image": None}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    summary = encode(tmp_path / "data.parquet", tiny_bundle, tmp_path / "out")
    assert (summary.encoded, summary.failed) == (1, 2)
