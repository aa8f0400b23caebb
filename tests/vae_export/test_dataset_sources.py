"""Where images come from: the same images of every kind of source, and errors that say what to do."""

import io
import json
import tarfile

import pytest
from dataset_samples import encode, image_bytes, make_folder

from runtimes import ConfigError

pa = pytest.importorskip("pyarrow", reason="pip install 'vae-export[dataset]'")

from pyarrow import parquet  # noqa: E402

from vae_export.dataset.sources import open_source  # noqa: E402

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


# What goes wrong ----------------------------------------------------------------------------------------------------


def test_no_images_at_all(tmp_path, tiny_bundle):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no images"):
        encode(tmp_path / "empty", tiny_bundle, tmp_path / "out")


def test_an_id_that_stands_twice(tmp_path, tiny_bundle):
    table = pa.table({"key": ["a", "b", "a"], "image": pa.array(IMAGES[:3], pa.binary())})
    parquet.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(ConfigError, match="'a' stands twice"):
        encode(open_source(tmp_path, id_column="key"), tiny_bundle, tmp_path / "out")
    make_tar(tmp_path / "twice.tar", IMAGES[:2])
    with tarfile.open(tmp_path / "twice.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("0000.png"))
    with pytest.raises(ConfigError, match=r"'twice/0000\.png' stands twice"):
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
    assert open_source(tmp_path, image_column="right").image_column == "right"
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
