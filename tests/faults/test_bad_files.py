"""Files that are not what they should be: one message that names the file and what is wrong, with the status of its
kind; never a defect of wrapq."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy
import pytest
from safetensors.torch import load_file

from tests import forked
from tests.faults.runs import tiny_model


def refused(done: CompletedProcess[str], status: int, message: str) -> None:
    """One message that matches, and the status."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert re.search(message, done.stderr), done.stderr


# --- data


def parquet(values: list[Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"text": values}), out)
    return out.getvalue()


def npy(array: numpy.ndarray) -> bytes:
    out = io.BytesIO()
    numpy.save(out, array)
    return out.getvalue()


def archive(array: numpy.ndarray) -> bytes:
    out = io.BytesIO()
    numpy.savez(out, ids=array)
    return out.getvalue()


LINES = b'{"text": "one"}\n{"text": "two"}\n'
IDS = numpy.arange(64).reshape(4, 16)
PARQUET = parquet([f"text {i}" for i in range(999)])
DATA = {
    "half a surrogate": (
        "jsonl",
        LINES + rb'{"text": "a \ud800 b"}',
        3,
        r"'{file}', line 3: .*\\ud800, half a surrogate",
    ),
    "a NUL": ("jsonl", LINES + b'{"text": "a\0b"}', 3, "'{file}', line 3: not valid JSON"),
    "a line cut": ("jsonl", LINES + b'{"text": "a', 3, "'{file}', line 3: not valid JSON"),
    "deep nesting": ("jsonl", LINES + b"[" * 100_000, 3, "'{file}', line 3: not valid JSON"),
    "a huge number": ("jsonl", LINES + b'{"text": ' + b"1" * 5000 + b"}", 3, "'{file}', line 3: "),
    "no such field": ("jsonl", LINES + b'{"txt": "a"}', 3, "'{file}', line 3: no field 'text'"),
    "latin": ("jsonl", LINES + b'{"text": "\xe4"}', 3, "'{file}', line 3: not valid UTF-8"),
    "gzip for lines": ("jsonl", gzip.compress(LINES), 2, "'{file}'.* is a gzip file: unpack"),
    "gzip for text": ("text", gzip.compress(b"a text " * 99), 2, "'{file}'.* is a gzip file: unpack"),
    "zip for text": ("text", archive(IDS), 2, "'{file}'.* is a zip file: unpack"),
    "UTF-16": ("text", ("a text " * 99).encode("utf-16"), 3, "'{file}', line 1: not valid UTF-8"),
    "a table cut": ("parquet", PARQUET[:-50], 2, "'{file}' cannot be read as parquet: "),
    "a table's pages": (
        "parquet",
        PARQUET[:50] + bytes(200) + PARQUET[250:],
        3,
        "'{file}' cannot be read as parquet: ",
    ),
    "a table's footer": (
        "parquet",
        PARQUET[:-300] + bytes(200) + PARQUET[-100:],
        2,
        "'{file}' cannot be read as parquet",
    ),
    "numbers": ("parquet", parquet([1, 2]), 2, "'{file}': column 'text' holds int64, expected text"),
    "an array cut": ("npy", npy(IDS)[:-9], 2, "'{file}' cannot be read as .npy: "),
    "an array's header": ("npy", npy(IDS).replace(b"'<i8'", b"'<q8'"), 2, "'{file}' cannot be read as .npy: "),
    "an archive": ("npy", archive(IDS), 2, r"'{file}' cannot be read as .npy: .*npz"),
    "floats": ("npy", npy(IDS / 2), 2, "'{file}': token ids must be integers, found torch.float64"),
    "texts": ("npy", npy(IDS.astype(str)), 2, "'{file}' cannot be read as .npy: "),
    "no vocabulary's": ("npy", npy(IDS + 5000), 3, r"{file}: token id 5063 is outside the vocabulary \(0 to 2047\)"),
    "negative": ("npy", npy(IDS - 5), 3, "{file}: token id -5 is outside the vocabulary"),
    "huge": ("npy", npy(IDS.astype("u8") + 2**63), 3, "{file}: token id .* is outside the vocabulary"),
    "no tensors": ("safetensors", b"\xff" * 99, 2, "'{file}' cannot be read as safetensors: "),
}


@pytest.mark.parametrize("damage", DATA)
def test_data(damage: str, model: Path, words: list[str], tmp_path: Path) -> None:
    kind, content, status, message = DATA[damage]
    file = tmp_path / f"data.{ {'text': 'txt'}.get(kind, kind) }"
    file.write_bytes(content)
    source = kind if kind in ("text", "jsonl", "parquet") else "tokens"
    few = (f"calibration={source}", f"calibration.path={file}", "calibration.seq_len=16", "calibration.samples=2")
    given = [word for word in words if word != "calibration=tiny"]
    done = forked.wrapq(
        [
            "plan" if status == 2 else "run",
            "recipe=w8a8_static",
            *given,
            *few,
            f"model.path={model}",
            f"paths.outputs={tmp_path / 'out'}",
        ]
    )
    refused(done, status, message.replace("{file}", re.escape(str(file))))


# --- models


def changed(**values: Any) -> Callable[[bytes], bytes]:
    return lambda raw: json.dumps({**json.loads(raw), **values}).encode()


CONFIGS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "not JSON": (lambda raw: raw[:-3], "cannot read the configuration: .*valid JSON"),
    "a list": (lambda raw: b"[1]", "cannot read the configuration: "),
    "a number": (lambda raw: b"7", "cannot read the configuration: "),
    "empty": (lambda raw: b"", "cannot read the configuration: "),
    "no text": (lambda raw: b"\xff\xfe\x00", "cannot read the configuration: "),
    "deep": (lambda raw: b"[" * 100_000, "cannot read the configuration: "),
    "no type": (lambda raw: raw.replace(b"model_type", b"x"), "cannot read the configuration: .*model_type"),
    "a type of its own": (changed(model_type="nobodys"), "cannot read the configuration: .*nobodys"),
    "a type of no language model": (changed(model_type="vit"), "no language model of the type vit"),
    "a text for a number": (changed(hidden_size="16"), "cannot read the configuration: .*hidden_size.* expected int"),
    "null for a number": (changed(num_hidden_layers=None), "cannot read the configuration: .*num_hidden_layers"),
    "negative": (changed(intermediate_size=-4), "cannot read the configuration: .*negative"),
    "no heads": (changed(num_attention_heads=0), "cannot read the configuration: "),
    "no blocks": (changed(num_hidden_layers=0), "no rule quantizes anything|matches no module"),
    "heads that do not divide": (changed(num_attention_heads=3), "cannot read the configuration: .*multiple"),
    "beyond numbers": (changed(hidden_size=10**30), "cannot read the configuration: "),
    "an activation of its own": (changed(hidden_act="nobodys"), "cannot read the configuration: "),
    "odd rotary": (changed(rope_parameters={"rope_type": "nobodys"}), "cannot read the configuration: "),
    "odd dtype": (changed(dtype="nobodys"), "cannot read the configuration: .*nobodys"),
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_configurations(damage: str, model: Path, words: list[str], tmp_path: Path) -> None:
    change, message = CONFIGS[damage]
    given = Path(shutil.copytree(model, tmp_path / "model"))
    (given / "config.json").write_bytes(change((given / "config.json").read_bytes()))
    done = forked.wrapq(["plan", "recipe=w8a8_static", *words, f"model.path={given}"])
    refused(done, 4 if "configuration" in message else 2, message)


def flip(raw: bytes) -> bytes:
    return raw[:3000] + bytes([raw[3000] ^ 255]) + raw[3001:]


TOKENIZERS = {
    "not JSON": lambda raw: raw[:-30],
    "empty": lambda raw: b"",
    "a list": lambda raw: b"[]",
    "no model": changed(model=None),
    "another model": changed(model={"type": "Nobodys"}),
    "merges of nothing": changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}),
    "no bytes": lambda raw: b"\0" * 99,
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_tokenizers(damage: str, model: Path, words: list[str], tmp_path: Path) -> None:
    given = Path(shutil.copytree(model, tmp_path / "model"))
    (given / "tokenizer.json").write_bytes(TOKENIZERS[damage]((given / "tokenizer.json").read_bytes()))
    done = forked.wrapq(["run", "recipe=w8a16", *words, f"model.path={given}", f"paths.outputs={tmp_path / 'out'}"])
    refused(done, 4, f"model.path {re.escape(str(given))}: cannot read the tokenizer: .")


def test_a_tokenizer_that_fails_when_it_is_used(model: Path, words: list[str], tmp_path: Path) -> None:
    given = Path(shutil.copytree(model, tmp_path / "model"))
    change = changed(model_max_length="many")
    (given / "tokenizer_config.json").write_bytes(change((given / "tokenizer_config.json").read_bytes()))
    done = forked.wrapq(["run", "recipe=w8a16", *words, f"model.path={given}", f"paths.outputs={tmp_path / 'out'}"])
    refused(done, 4, "the model's tokenizer cannot read the text: ")


def test_a_model_that_does_not_compute(words: list[str], tmp_path: Path) -> None:
    given = tiny_model(tmp_path / "model", "opt")
    (given / "config.json").write_bytes(changed(dropout=3.0)((given / "config.json").read_bytes()))
    done = forked.wrapq(["run", "recipe=w8a16", *words, f"model.path={given}", f"paths.outputs={tmp_path / 'out'}"])
    refused(done, 4, f"model.path {re.escape(str(given))}: the model does not compute: .*probability")


def test_a_tokenizer_of_another_model(model: Path, words: list[str], tmp_path: Path) -> None:
    small = tiny_model(tmp_path / "small", vocab_size=100)
    done = forked.wrapq(["run", "recipe=w8a16", *words, f"model.path={small}", f"paths.outputs={tmp_path / 'out'}"])
    refused(done, 3, r"token id \d+ is outside the vocabulary \(0 to 99\)")


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """The file with its header changed."""

    def changed(raw: bytes) -> bytes:
        end = 8 + int.from_bytes(raw[:8], "little")
        facts = json.loads(raw[8:end])
        change(facts)
        text = json.dumps(facts).encode()
        return len(text).to_bytes(8, "little") + text + raw[end:]

    return changed


NORM = "model.norm.weight"
WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut in the length": lambda raw: raw[:5],
    "cut in the header": lambda raw: raw[:100],
    "cut in the data": lambda raw: raw[:-9],
    "a length beyond the file": lambda raw: (2**40).to_bytes(8, "little") + raw[8:],
    "a length beyond numbers": lambda raw: b"\xff" * 8 + raw[8:],
    "no JSON": lambda raw: raw[:8] + raw[8:].replace(b"{", b"x"),
    "a list": lambda raw: (2).to_bytes(8, "little") + b"[]" + raw[10:],
    "tensors that overlap": header(lambda facts: facts[NORM].update(data_offsets=[0, 64])),
    "offsets backwards": header(lambda facts: facts[NORM].update(data_offsets=facts[NORM]["data_offsets"][::-1])),
    "an unknown type": header(lambda facts: facts[NORM].update(dtype="Q9")),
    "another type": header(lambda facts: facts[NORM].update(dtype="F64")),
    "another shape": header(lambda facts: facts[NORM].update(shape=[4, 4])),
    "a negative shape": header(lambda facts: facts[NORM].update(shape=[-16])),
    "a shape beyond numbers": header(lambda facts: facts[NORM].update(shape=[2**63, 2**63])),
    "another name": header(lambda facts: facts.update({"x": facts.pop(NORM)})),
}


@pytest.mark.parametrize("load", ["whole", pytest.param("streaming", marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", WEIGHTS)
def test_weights(damage: str, load: str, model: Path, words: list[str], tmp_path: Path) -> None:
    given = Path(shutil.copytree(model, tmp_path / "model"))
    (given / "model.safetensors").write_bytes(WEIGHTS[damage]((given / "model.safetensors").read_bytes()))
    more = (f"model.path={given}", f"runtime.load={load}", f"paths.outputs={tmp_path / 'out'}")
    done = forked.wrapq(["run", "recipe=w8a16", *words, *more])
    refused(done, 4, re.escape(str(given)))


def test_an_index_of_files_that_are_not_there(model: Path, words: list[str], tmp_path: Path) -> None:
    given = Path(shutil.copytree(model, tmp_path / "model"))
    names = load_file(given / "model.safetensors")
    (given / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (given / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in ("whole", "streaming"):
        more = (f"model.path={given}", f"runtime.load={load}", f"paths.outputs={tmp_path / 'out'}")
        done = forked.wrapq(["run", "recipe=w8a16", *words, *more])
        refused(done, 4, f"model.path {re.escape(str(given))}: .*safetensors")


# --- run folders

LOAD = """
import sys, wrapq
try:
    wrapq.load({run!r})
except wrapq.WrapqError as error:
    sys.exit(print(f"error: {{error}}", file=sys.stderr) or error.exit_code)
"""
READERS = {
    "evaluate": ("config.json", "manifest.json", "model.safetensors", "tokenizer.json"),
    "load": ("config.json", "manifest.json", "model.safetensors"),
    "export": ("config.json", "manifest.json", "model.safetensors", "plan.json", "tokenizer.json"),
    "verify": ("recipe.lock.yaml", "manifest.json"),
    "compare": ("run.json", "plan.json", "modules.json", "recipe.lock.yaml"),
    "diff": ("plan.json", "recipe.lock.yaml"),
    "from-run": ("recipe.lock.yaml",),
}
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "a list": lambda raw: b"[]",
    "a number": lambda raw: b"7",
    "no text": lambda raw: b"\xff\xfe\0",
    "deep": lambda raw: b"[" * 100_000,
}


ALIKE = ("empty", "a list", "a number", "no text")  # of which the others say enough


@pytest.mark.parametrize("damage", [pytest.param(d, marks=pytest.mark.slow if d in ALIKE else ()) for d in DAMAGES])
@pytest.mark.parametrize(("command", "name"), [(command, name) for command in READERS for name in READERS[command]])
def test_run_folders(command: str, name: str, damage: str, finished: Path, words: list[str], tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / name).write_bytes(DAMAGES[damage]((run / name).read_bytes()))
    where = f"paths.outputs={tmp_path / 'out'}"
    lines: dict[str, list[str]] = {
        "evaluate": ["evaluate", str(run), *words[:2], "evaluation=tiny", where],
        "load": ["-c", LOAD.format(run=str(run))],
        "export": ["export", str(run), "export=compressed_tensors", where],
        "compare": ["compare", str(run), str(finished), where],
        "diff": ["diff", str(run), str(finished), where],
        "from-run": ["recipe", "from-run", str(run), where],
    }
    done = forked.wrapq(lines.get(command, [command, str(run), where]))
    refused(done, 4, re.escape(str(run)))


@pytest.mark.parametrize("change", [{"num_attention_heads": 16}, {"output_hidden_states": 0.5}], ids=str)
def test_a_run_whose_configuration_was_changed(
    change: dict[str, Any], finished: Path, words: list[str], tmp_path: Path
) -> None:
    """What fails then is no defect."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "config.json").write_bytes(changed(**change)((run / "config.json").read_bytes()))
    done = forked.wrapq(["evaluate", str(run), *words[:2], "evaluation=tiny", f"paths.outputs={tmp_path / 'out'}"])
    refused(done, 4, f"{re.escape(str(run))}: config.json changed since the run, and the model does not compute: ")
