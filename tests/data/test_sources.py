"""Data sources: what they read, and that every mistake is one clear message."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wrapq.data.sources import files
from wrapq.data.sources.base import SOURCES, TextSource, TokenSource, make_source
from wrapq.errors import CalibrationError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def documents(name: str, **options: object) -> list[str]:
    source = make_source(name, options)
    assert isinstance(source, TextSource)
    source.check()
    return list(source.documents())


def fails(match: str, name: str, **options: object) -> None:
    with pytest.raises(CalibrationError, match=match):
        documents(name, **options)


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_every_source_is_registered() -> None:
    assert {"demo", "text", "jsonl", "parquet", "datasets", "tokens"} <= set(SOURCES)


def test_unknown_source_lists_the_nearest() -> None:
    with pytest.raises(CalibrationError, match=r"unknown data source 'parqet'\n    did you mean: .*parquet"):
        make_source("parqet")


def test_all_option_mistakes_are_listed_at_once() -> None:
    with pytest.raises(CalibrationError) as error:
        make_source("jsonl", {"pth": "x", "field": 3})
    message = str(error.value)
    assert "source jsonl has no option 'pth'\n    did you mean: path" in message
    assert "source jsonl needs path" in message
    assert "field: 3: input should be a valid string" in message


def test_demo_text_ships_with_the_package() -> None:
    source = make_source("demo", {"split": "heldout"})
    source.check()
    (text,) = source.documents()
    assert len(text) > 10_000
    assert source.describe() == "demo/heldout"
    with pytest.raises(CalibrationError, match="split: 'test': input should be"):
        make_source("demo", {"split": "test"})


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffone\r\n\r\ntwo\n")
    assert documents("text", path=path) == ["one\n\ntwo\n"]
    assert documents("text", path=path, separator="\n\n") == ["one", "two\n"]


def test_text_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.bin"):
        write(tmp_path / name, name)
    assert documents("text", path=str(tmp_path)) == ["a.txt", "b.txt"]


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "corpus.txt", "x")
    fails(r"corpos.txt' does not exist; in .* there is: corpus.txt", "text", path=str(tmp_path / "corpos.txt"))
    fails("the folder .* does not exist", "text", path=str(tmp_path / "no" / "corpus.txt"))


@pytest.mark.parametrize("content, match", [("", "is empty"), (" \n\t\n", "holds no text")])
def test_empty_text_is_refused_by_the_check(tmp_path: Path, content: str, match: str) -> None:
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(CalibrationError, match=match):
        make_source("text", {"path": path}).check()


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    fails("holds no file ending in .txt or .md", "text", path=str(tmp_path))


def test_invalid_utf8_names_line_and_byte(tmp_path: Path) -> None:
    fails("line 2: not valid UTF-8 .byte 0xff at position 3", "text", path=write(tmp_path / "a.txt", b"one\ntwo\xff\n"))


def test_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"body": "one"}\n\n{"body": "two"}\n')
    assert documents("jsonl", path=path, field="body") == ["one", "two"]


@pytest.mark.parametrize(
    "line, match",
    [
        ('{"txt": "x"}', "line 3: no field 'text' or 'messages'; its fields are like: txt"),
        ("{", "line 3: not valid JSON"),
        ("[1]", "line 3: expected an object, found list"),
        ('{"text": 3}', "line 3: field 'text' is int, expected text"),
    ],
)
def test_jsonl_mistakes_name_the_line(tmp_path: Path, line: str, match: str) -> None:
    fails(match, "jsonl", path=write(tmp_path / "a.jsonl", f'{{"text": "one"}}\n\n{line}\n'))


def test_jsonl_wrong_field_is_refused_by_the_check(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n')
    with pytest.raises(CalibrationError, match="no field 'body'"):
        make_source("jsonl", {"path": path, "field": "body"}).check()


def test_parquet(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert documents("parquet", path=path) == ["one", "", "two"]
    fails("no field 'txt'; its fields are like: text", "parquet", path=path, field="txt")
    fails("column 'n' holds int64, expected text", "parquet", path=path, field="n")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    fails("has no rows", "parquet", path=path)
    fails("cannot be read as parquet", "parquet", path=write(tmp_path / "b.parquet", "text"))


@pytest.mark.parametrize("name", ["text", "jsonl"])
def test_packed_files_are_read_as_what_is_in_them(tmp_path: Path, name: str) -> None:
    suffix, plain = {"text": (".txt", "one\ntwo\n"), "jsonl": (".jsonl", '{"text": "one"}\n{"text": "two"}\n')}[name]
    for file in ("a", "b"):
        write(tmp_path / f"{file}{suffix}.gz", gzip.compress(plain.encode()))
    expected = documents(name, path=write(tmp_path / "other", plain))
    assert documents(name, path=str(tmp_path / f"a{suffix}.gz")) == expected
    assert documents(name, path=str(tmp_path)) == expected * 2


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (gzip.compress(b'{"text": "one"}\n' * 9)[:-12], "a.jsonl.gz' cannot be unpacked by gzip: .*end-of-stream"),
        (gzip.compress(b'{"text": "one"}\n' * 9)[:20] + b"\xff" * 40, "a.jsonl.gz' cannot be unpacked by gzip: "),
        (gzip.compress(b'{"text": "one"}\n')[:-8] + b"\0" * 8, "a.jsonl.gz' cannot be unpacked by gzip: CRC"),
        (b'{"text": "one"}\n', "a.jsonl.gz' cannot be unpacked by gzip: Not a gzipped file"),
        (gzip.compress(gzip.compress(b"x" * 99)), "a.jsonl.gz' is a gzip file: unpack it"),
        (gzip.compress(b"\n \n"), "a.jsonl.gz' holds no text"),
        (b"", "a.jsonl.gz' is empty"),
    ],
    ids=["truncated", "damaged", "checksum", "not packed", "twice", "blank", "empty"],
)
def test_packed_files_that_cannot_be_read(tmp_path: Path, content: bytes, match: str) -> None:
    fails(match, "jsonl", path=write(tmp_path / "a.jsonl.gz", content))


@pytest.mark.parametrize("content", [b"x", b"\n", b'{"text": "one"}\n'], ids=["one line", "blank lines", "rows"])
def test_a_packed_file_gives_no_more_than_a_text_would(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "UNPACKED", 1 << 16)
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(content * (1 << 18)))
    fails(r"a.jsonl.gz', line \d+: out of [\d,]+ bytes come \d+ MiB: unpack it", "jsonl", path=path)
    rows = "".join(json.dumps({"text": f"{i * i:x}" * 3}) + "\n" for i in range(4000)).encode()
    assert len(documents("jsonl", path=write(tmp_path / "b.jsonl.gz", gzip.compress(rows)))) == 4000


def test_datasets_reads_what_it_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["one", None, "two"]})
    datasets.DatasetDict(train=table, test=table.select([2])).save_to_disk(tmp_path / "many")
    table.save_to_disk(tmp_path / "one")
    assert documents("datasets", path=str(tmp_path / "many")) == ["one", "", "two"]
    assert documents("datasets", path=str(tmp_path / "many"), split="test") == ["two"]
    assert documents("datasets", path=str(tmp_path / "one"), split="test") == ["one", "", "two"]
    fails("no split 'dev' in it; there is: train, test", "datasets", path=str(tmp_path / "many"), split="dev")
    fails("has no configuration and no revision", "datasets", path=str(tmp_path / "one"), revision="main")


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("parquet", "datasets"):
        fails("pip install 'wrapq.data.'", name, path=str(tmp_path))


def test_datasets_reads_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    write(data / "train.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in ("one", "two")))
    for streaming in (False, True):
        assert documents("datasets", path=str(data), streaming=streaming) == ["one", "two"]
        fails("no field 'txt'; its fields are like: text", "datasets", path=str(data), field="txt", streaming=streaming)
    fails("cannot be loaded", "datasets", path=str(data), split="nope")
    fails("does not exist", "datasets", path=str(tmp_path / "nope"))


def test_datasets_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    fails("datasets:no/such/train cannot be loaded: .*\n.*without a network", "datasets", path="no/such")


def rows(path: Path, **options: object) -> list[list[int]]:
    source = make_source("tokens", {"path": str(path), **options})
    assert isinstance(source, TokenSource)
    source.check()
    found = list(source.token_rows())
    assert all(row.dtype == torch.int64 for row in found)
    return [row.tolist() for row in found]


@pytest.mark.parametrize("dtype", ["<i4", ">i8", "<u2"])
def test_tokens_npy(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3).astype(dtype))
    assert rows(tmp_path / "a.npy") == [[0, 1, 2], [3, 4, 5]]


def test_tokens_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(3, dtype=torch.int32)}, path)
    assert rows(path) == [[0, 1, 2]]
    save_file({"x": torch.zeros(2, 2, dtype=torch.int64), "y": torch.ones(1, 2, dtype=torch.int64)}, path)
    assert rows(path, tensor="y") == [[1, 1]]
    with pytest.raises(CalibrationError, match=r"several tensors.*it holds: x, y"):
        rows(path)
    with pytest.raises(CalibrationError, match="no tensor 'z'"):
        rows(path, tensor="z")


def test_tokens_mistakes(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.zeros((2, 3)))
    np.save(tmp_path / "cube.npy", np.zeros((2, 3, 4), dtype=int))
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    write(tmp_path / "junk.safetensors", "junk that is no header")
    write(tmp_path / "ids.pt", "x")
    for name, match in [
        ("float.npy", "must be integers"),
        ("cube.npy", r"expected a matrix .*\[2, 3, 4\]"),
        ("pickle.npy", "cannot be read as .npy"),
        ("junk.safetensors", "cannot be read as safetensors"),
        ("ids.pt", "from .safetensors or .npy files only"),
    ]:
        with pytest.raises(CalibrationError, match=match):
            rows(tmp_path / name)
