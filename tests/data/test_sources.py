import dataclasses
import json
import os
import pickle
import sys

import numpy as np
import pytest

from patchword.data import parquet, sources
from patchword.data.contents import BLOCK, digest_files
from patchword.data.images import BadImage, decode
from patchword.data.registry import open_source
from patchword.data.sources import ArrayReader
from patchword.spec.parse import PatchwordError


def test_digits():
    source = open_source("digits")
    assert (source.name, len(source), source.channels) == ("digits", 1797, 1)
    assert source.classes == tuple("0123456789")
    assert len(set(source.keys)) == 1797
    images = np.stack([source.read(i) for i in range(1797)])
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert set(np.unique(images)) == {round(v * 255 / 16) for v in range(17)}


def test_a_folder_per_class(folder):
    root = folder({"dog": 2, "cat/indoors": 2, "cat/outdoors": 1, "empty": 0})
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_bytes(b"")
    (root / "dog" / "LOUD.JPEG").write_bytes(b"broken")
    source = open_source(str(root))
    assert source.name == "pets"
    assert source.classes == ("cat", "dog")
    assert list(source.keys) == [
        *("cat/indoors/000.png", "cat/indoors/001.png", "cat/outdoors/000.png"),
        *("dog/000.png", "dog/001.png", "dog/LOUD.JPEG"),
    ]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.labels.dtype == np.int64
    assert source.parts == {}
    assert source.location(5) == str(root / "dog/LOUD.JPEG")
    assert source.read(5) == b"broken"
    assert decode(source.read(0), 3).size == (16, 12)
    (root / "dog/LOUD.JPEG").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.read(5)


@pytest.mark.parametrize("val", ["val", "validation", "Valid"])
def test_a_folder_with_splits(folder, val):
    root = folder({"train/a": 3, "train/b": 2, f"{val}/b": 1, "test/a": 2, "notes": 0})
    source = open_source(str(root))
    assert source.classes == ("a", "b")
    found = {part: [source.keys[i] for i in at] for part, at in source.parts.items()}
    assert found == {
        "train": [f"train/a/00{i}.png" for i in range(3)]
        + [f"train/b/00{i}.png" for i in range(2)],
        "val": [f"{val}/b/000.png"],
        "test": ["test/a/000.png", "test/a/001.png"],
    }


def test_a_class_may_be_called_train(folder):
    source = open_source(str(folder({"train": 2, "bus": 1})))
    assert source.classes == ("bus", "train")
    assert source.parts == {}


def test_images_beside_splits_are_an_error(folder):
    with pytest.raises(PatchwordError, match="images in extra/ beside the split"):
        open_source(str(folder({"train/a": 1, "extra": 1})))


def test_linked_folders_are_followed_but_not_in_circles(folder, tmp_path):
    root = folder({"a": 1, "b": 1})
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "c").symlink_to(root / "b")
    assert list(open_source(str(root)).keys) == ["a/000.png", "b/000.png", "c/000.png"]


def test_fingerprints_follow_the_data_not_the_place(folder, tmp_path):
    root = folder({"a": 2, "b": 1})
    first = open_source(str(root)).fingerprint
    assert len(first) == 64
    moved = root.rename(tmp_path / "elsewhere")
    assert open_source(str(moved)).fingerprint == first
    (moved / "b" / "000.png").rename(moved / "a" / "new.png")
    assert open_source(str(moved)).fingerprint != first


def _swap(path):
    """Other bytes, as many."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("whole", [True, False])
def test_fingerprints_are_of_contents_not_of_times(folder, monkeypatch, whole):
    monkeypatch.setattr(sources, "WHOLE_BYTES", 1 << 31 if whole else 10)
    root = folder({"a": 2, "b": 1}, size=(80, 90))
    first = open_source(str(root)).fingerprint
    os.utime(root / "a/000.png", (0, 0))
    assert open_source(str(root)).fingerprint == first
    _swap(root / "a/000.png")
    second = open_source(str(root)).fingerprint
    assert second != first
    (root / "b/000.png").unlink()
    (root / "b/000.png").symlink_to(root / "nowhere")  # not in the source
    assert open_source(manifest(root, "path,label\na/000.png,a\nb/000.png,b\n")).fingerprint


def test_a_sample_is_blocks_from_end_to_end(tmp_path):
    path = tmp_path / "file"
    size = 5 << 20
    path.write_bytes(bytes(size))

    def seen(at):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"x")
            file.flush()
            changed = digest_files([str(path)], whole=False) != plain
            file.seek(at)
            file.write(b"\0")
        return changed

    plain = digest_files([str(path)], whole=False)
    assert plain != digest_files([str(path)], whole=True)
    assert all(map(seen, (0, BLOCK - 1, (size - BLOCK) // 4, size // 2, size - BLOCK, size - 1)))
    assert not any(map(seen, (BLOCK, size - BLOCK - 1)))
    path.write_bytes(bytes(size + 1))
    assert digest_files([str(path)], whole=False) != plain


def test_files_that_cannot_be_read_have_a_digest_without_being_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"one")
    names = ["pipe", "gone", "file", "a\0"]
    paths = [str(tmp_path / name) for name in names]
    made = digest_files(paths, whole=True)
    assert made == digest_files(paths, whole=True)
    (tmp_path / "gone").write_bytes(b"")
    assert made != digest_files(paths, whole=True)


def test_fingerprints_of_arrays_are_of_their_pixels(labelled):
    source = labelled([0, 1])
    other = ArrayReader(np.ones((2, 2, 2, 3), np.uint8), "made")
    changed = dataclasses.replace(source, reader=other)
    assert changed.fingerprint != source.fingerprint
    assert changed.size_fingerprint == source.size_fingerprint


def test_workers_get_the_fingerprint_ready_made(folder, monkeypatch):
    source = open_source(str(folder({"a": 2})))
    first = source.fingerprint
    copy = pickle.loads(pickle.dumps(source))
    monkeypatch.setattr(sources, "digest_files", None)
    assert copy.fingerprint == first


def manifest(root, text):
    (root / "list.csv").write_text(text, encoding="utf-8")
    return str(root / "list.csv")


def test_fingerprints_of_names_that_are_not_utf_8(labelled):
    odd = [os.fsdecode(name) for name in (b"caf\xe9", b"caf\xe8")]
    prints = {dataclasses.replace(labelled([0]), keys=(name,)).fingerprint for name in odd}
    assert len(prints) == 2


def test_manifest(folder):
    root = folder({"a": 3})
    text = (
        "label,path,split\nx,a/000.png,train\ny,a/001.png,Validation\n"
        f'"x, too",{root}/a/002.png,test\n'
    )
    source = open_source(manifest(root, text))
    assert source.classes == ("x", "x, too", "y")
    assert source.labels.tolist() == [0, 2, 1]
    assert {part: at.tolist() for part, at in source.parts.items()} == {
        "train": [0],
        "val": [1],
        "test": [2],
    }
    assert [decode(source.read(i), 3).size for i in range(3)] == [(16, 12)] * 3


def test_manifest_without_splits_and_with_a_missing_file(folder):
    source = open_source(manifest(folder({"a": 1}), "\ufeffpath,label\na/000.png,x\ngone.png,y\n"))
    assert source.parts == {}
    assert source.sizes[1] == -1
    with pytest.raises(BadImage, match="No such file"):
        source.read(1)


def test_files_that_are_no_files_are_bad(folder, tmp_path, monkeypatch):
    root = folder({"a": 2})
    os.mkfifo(root / "pipe.png")
    text = "path,label\na/000.png,x\npipe.png,y\na,z\na/\0.png,z\na/001.png,x\n"
    source = open_source(manifest(root, text))
    assert decode(source.read(0), 3).size == (16, 12)
    for index, reason in ((1, "regular"), (2, "regular"), (3, "null")):
        with pytest.raises(BadImage, match=reason):
            source.read(index)
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 10)
    with pytest.raises(BadImage, match="file of more than"):
        source.read(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'label'"),
        ("file,label\na,b\n", "no column 'path'"),
        ("path,label\n", "lists no images"),
        ("path,label\na/000.png,\n", "line 2: empty path or label"),
        ("path,label\na/000.png,x\na/000.png,y\n", "line 3: 'a/000.png' is on line 2 too"),
        ("path,label,split\na/000.png,x,later\n", "line 2: split 'later'; use train, val or test"),
        ("path,label\nnone.png,x\n", "none of its 1 files exist, such as 'none.png'"),
    ],
)
def test_manifest_errors_name_the_line(folder, text, message):
    with pytest.raises(PatchwordError) as caught:
        open_source(manifest(folder({"a": 1}), text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no/such/place", "hub", "digit", "{tmp}/notes.txt", "{tmp}"])
def test_unknown_sources_name_what_is_accepted(tmp_path, name):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(PatchwordError) as caught:
        open_source(name.format(tmp=tmp_path))
    assert "folder per class" in str(caught.value)
    assert ".csv manifest" in str(caught.value)


# Parquet -----------------------------------------------------------------------------------------


@pytest.fixture
def write(photo, encode):
    """`write(path, labels)`: a parquet file of small PNG images, row groups of 3."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def make(path, labels, names=None, struct=True, column="image"):
        files = [encode(photo(6, 8, i)) for i in range(len(labels))]
        images = [{"bytes": data, "path": None} for data in files] if struct else files
        table = pa.table({column: images, "label": labels})
        if names:
            features = {"label": {"names": names, "_type": "ClassLabel"}}
            metadata = json.dumps({"info": {"features": features}})
            table = table.replace_schema_metadata({"huggingface": metadata})
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=3)
        return files

    return make


@pytest.mark.parametrize("below", ["", "data"])
@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_parquet_of_the_hub_layout(tmp_path, write, monkeypatch, below, limit):
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", limit)
    monkeypatch.setattr(parquet, "GROUPS_KEPT", 2)
    root = tmp_path / "birds"
    names = ["wren", "auk"]
    parts = {"test": 4, "train": 10, "validation": 2}
    files = []
    for part, count in parts.items():
        path = root / below / f"{part}-00000-of-00001.parquet"
        files += write(path, [i % 2 for i in range(count)], names)
    source = open_source(str(root))
    assert (source.name, source.classes) == ("birds", ("wren", "auk"))
    assert {part: at.tolist() for part, at in source.parts.items()} == {
        "train": list(range(4, 14)),
        "val": [14, 15],
        "test": [0, 1, 2, 3],
    }
    assert len(set(source.keys)) == 16
    assert source.location(5).endswith("train-00000-of-00001.parquet row 1")
    copy = pickle.loads(pickle.dumps(source))
    for i in np.random.default_rng(0).permutation(16):
        assert source.read(i) == copy.read(i) == files[i]
    assert copy.fingerprint == source.fingerprint
    assert len(pickle.dumps(source)) < 5000


def test_parquet_of_other_kinds(tmp_path, write):
    files = write(tmp_path / "a.parquet", ["x", "y", "x"], struct=False, column="img")
    source = open_source(str(tmp_path / "a.parquet"))
    assert (source.name, source.classes, source.parts) == ("a", ("x", "y"), {})
    assert source.labels.tolist() == [0, 1, 0]
    assert [source.read(i) for i in range(3)] == files
    write(tmp_path / "b" / "train" / "0000.parquet", [7, 5, 7])
    numbered = open_source(str(tmp_path / "b"))
    assert numbered.classes == ("5", "7")
    assert numbered.labels.tolist() == [1, 0, 1]
    assert list(numbered.parts) == ["train"]


def test_a_part_without_labels_is_left_out(tmp_path, write, caplog):
    write(tmp_path / "c" / "test-0.parquet", [-1, -1])
    files = write(tmp_path / "c" / "train-0.parquet", [0, 1, 0])
    source = open_source(str(tmp_path / "c"))
    assert "test-0.parquet: 2 images without labels" in caplog.text
    assert list(source.parts) == ["train"]
    assert [source.read(i) for i in range(3)] == files


def test_parquet_errors(tmp_path, write):
    def message(*files):
        root = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
        for name, labels, options in files:
            write(root / name, labels, **options)
        with pytest.raises(PatchwordError) as caught:
            open_source(str(root))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "without a label" in message(("train-0.parquet", [0, -1], {"names": ["a"]}))
    for labels, span in (([0, 3], "0 to 3"), ([-5, 1], "-5 to 1")):
        found = message(("train-0.parquet", labels, {"names": ["a", "b"]}))
        assert f"labels from {span} but 2 class names" in found
    mixed = message(("train-0.parquet", [0, 1], {}), ("test-0.parquet", ["0", "1"], {}))
    assert "all whole numbers or all text" in mixed
    assert "no column image or img" in message(("train-0.parquet", [0], {"column": "photo"}))
    assert "belongs to no split" in message(("train-0.parquet", [0], {}), ("x.parquet", [0], {}))
    differing = [
        ("test-0.parquet", [0], {"names": ["a"]}),
        ("val-0.parquet", [0], {"names": ["b"]}),
    ]
    assert "class names differ" in message(*differing)
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(PatchwordError, match="cannot be read"):
        open_source(str(tmp_path / "junk.parquet"))


@pytest.mark.parametrize("whole", [True, False])
def test_fingerprints_of_parquet_are_of_its_bytes(tmp_path, monkeypatch, whole):
    """As many bytes, other pixels: bitmaps."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(sources, "WHOLE_BYTES", 1 << 31 if whole else 10)
    prints, sizes = set(), set()
    for name, first in (("one", 1), ("same", 1), ("other", 2)):
        images = [bytes([first]) * 5000, bytes([3 - first]) * 5000]
        path = tmp_path / name / "train.parquet"
        path.parent.mkdir()
        pq.write_table(pa.table({"image": images, "label": [0, 1]}), path)
        source = open_source(str(path))
        prints.add(source.fingerprint)
        sizes.add(source.size_fingerprint)
    assert (len(prints), len(sizes)) == (2, 1)


def test_rows_without_an_image_are_bad(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pa.array([None, {"bytes": None}], pa.struct([("bytes", pa.binary())]))
    pq.write_table(pa.table({"image": images, "label": ["a", "b"]}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    for row in range(2):
        with pytest.raises(BadImage, match="no image bytes"):
            source.read(row)


@pytest.mark.parametrize("images", [["a.png"] * 2, [{"path": "a.png"}] * 2, [[1, 2]] * 2])
def test_columns_that_hold_no_files_are_an_error(tmp_path, images):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "a.parquet")
    with pytest.raises(PatchwordError, match=r"column image holds .* bytes of image"):
        open_source(str(tmp_path / "a.parquet"))


def test_damaged_row_groups_cost_their_own_images(tmp_path):
    """Whichever bits of the pages are flipped; bytes that arrow does not miss are the decoder's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    images = [{"bytes": rng.bytes(20) * 4, "path": None} for _ in range(40)]
    pq.write_table(pa.table({"image": images, "label": [0, 1] * 20}), path, row_group_size=10)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    whole, first = path.read_bytes(), column.dictionary_page_offset
    messages = set()
    for _ in range(60):
        damaged = bytearray(whole)
        for at in rng.integers(first, first + column.total_compressed_size, 3):
            damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        source = open_source(str(path))
        for row in range(40):
            try:
                read = source.read(row)
            except BadImage as error:
                assert 10 <= row < 20
                messages.add(str(error))
            else:
                assert 10 <= row < 20 or read == images[row]["bytes"]
    assert len(messages) > 1


def test_the_hub_is_read_without_decoding(monkeypatch):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["wren", "auk"])}
    )
    files = {}
    for split in ("train", "validation", "extra"):
        images = [
            {"bytes": b"no image " + split.encode() * (i + 1), "path": None} for i in range(5)
        ]
        rows = {"image": images, "label": [0, 1, 1, 0, 1]}
        files[split] = datasets.Dataset.from_dict(rows, features=features)
    asked = []

    def load_dataset(name):
        asked.append(name)
        return datasets.DatasetDict(files)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("hub:org/birds")
    assert asked == ["org/birds"]
    assert (source.name, source.classes, len(source)) == ("birds", ("wren", "auk"), 10)
    assert {part: at.tolist() for part, at in source.parts.items()} == {
        "train": [0, 1, 2, 3, 4],
        "val": [5, 6, 7, 8, 9],
    }
    assert source.labels.tolist() == [0, 1, 1, 0, 1] * 2
    assert source.read(6) == b"no image validationvalidation"
    assert source.location(6) == "hub:org/birds val row 1"


def test_hub_sets_are_told_apart(monkeypatch):
    """Of as many rows and the same classes, by name, content and commit."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["wren", "auk"])}
    )

    def source(name="org/birds", value=b"a", commit=None):
        rows = {"image": [{"bytes": value, "path": None}] * 3, "label": [0, 1, 1]}
        data = datasets.Dataset.from_dict(rows, features=features)
        if commit:
            url = f"hf://datasets/org/birds@{commit}/train.parquet"
            data.info.download_checksums = {url: {"num_bytes": 9, "checksum": None}}
        made = datasets.DatasetDict({"train": data})
        monkeypatch.setattr(datasets, "load_dataset", lambda asked: made)
        return open_source(f"hub:{name}")

    first = source()
    others = [source(value=b"b"), source("org/birds-c"), source(commit="1a"), source(commit="2b")]
    assert len({one.fingerprint for one in (first, *others)}) == 5
    assert source().fingerprint == first.fingerprint
    assert pickle.loads(pickle.dumps(first)).fingerprint == first.fingerprint


def test_the_hub_is_told_of_no_use(monkeypatch):
    """When the library is called, it names no other package to the hub, and counts no download."""
    import datasets
    from datasets import config
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    assert "torch/" in build_hf_headers()["user-agent"]
    told = []

    def load_dataset(name):
        told.append((build_hf_headers()["user-agent"], config.HF_UPDATE_DOWNLOAD_COUNTS))
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(PatchwordError, match="cannot be loaded"):
        open_source("hub:o/n")
    ((agent, counted),) = told
    assert "torch/" not in agent
    assert not counted


@pytest.mark.parametrize(
    ("library", "name"), [("datasets", "hub:o/n"), ("pyarrow", "{tmp}/a.parquet")]
)
def test_a_missing_extra_is_named_with_its_command(tmp_path, monkeypatch, library, name):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(PatchwordError, match=r"pip install .*\[hub\]"):
        open_source(name.format(tmp=tmp_path))


def test_an_unreachable_hub_is_one_line(monkeypatch):
    import datasets

    def fail(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        PatchwordError, match=r"hub:o/n cannot be loaded \(no route to host\); check"
    ):
        open_source("hub:o/n")
