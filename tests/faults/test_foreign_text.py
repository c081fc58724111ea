"""Text from outside is shown and does nothing: from every source, on every way out."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy
import pytest

from tests import forked
from tests.engine.record import only_run, recorded
from tests.models import DEMO
from tests.recipes.test_recipes import RECIPES
from wrapq.console.plain_table import plain_table
from wrapq.console.plan_table import plan_tables
from wrapq.console.replay_summary import verdict_tables
from wrapq.console.run_summary import ConsoleProgress, plan_line, quality_table, show_result
from wrapq.console.sweep_table import ConsoleSweep, show_sweep
from wrapq.console.terminal import Terminal
from wrapq.data.sources.base import SOURCES, TextSource
from wrapq.engine.export import Exported
from wrapq.engine.record import RunResult
from wrapq.engine.replay import Difference, Verdict
from wrapq.foreign import plain
from wrapq.metrics import Measured
from wrapq.recipe.compose import compose
from wrapq.registry import Options
from wrapq.resolve.plan import Plan
from wrapq.resolve.resolve import resolve
from wrapq.sweep.driver import SweepResult
from wrapq.sweep.job import FAILED, FINISHED, Outcome
from wrapq.sweep.table import SweepRow, make_table
from wrapq.tracking.outbox import Event, Outbox

INVERSE, TITLE = "\x1b[35;7m", "\x1b]0;mine\x07"
KINDS = {
    "closing tag": "[/]",
    "tags": "[red]x[/red] [link=http://x]y[/link]",
    "emoji": ":bug:",
    "colour": f"{INVERSE}x",
    "title": f"{TITLE}x",
    "C1": "\x9b35;7mx",
    "direction": "\u202egnp.exe",
    "return": "a\rb",
    "line": "a\nb",
    "surrogate": "a\udcff",
}
ALL = f"[/] [red]{INVERSE}{TITLE}\x9b7m\u202e:bug: <script>alert(1)</script>"
_OWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def bare(text: str) -> str:
    """`text` without what wraps it, and without what rich leaves out."""
    return re.sub(r"[\s␍␇]", "", text)


def acts(text: str) -> list[str]:
    """What is in `text` beyond letters and lines; a terminal's own colours and movements are to be taken out before."""
    kinds = ("Cc", "Cs", "Zl", "Zp")
    return [c for c in text if c not in "\n\t" and (unicodedata.category(c) in kinds or c in "\u202e\u2066\u200e")]


def harmless(text: str, terminal: bool = False) -> str:
    """`text`, bare, after it was found that nothing in it acts but what the terminal's own tables and bars do."""
    assert INVERSE not in text and TITLE not in text
    if terminal:
        text = _OWN.sub("", text.replace("\r\n", "\n").replace("\r", ""))
    assert acts(text) == []
    return bare(text)


def on_terminal(arguments: list[str], folder: Path) -> tuple[int | None, str]:
    """`wrapq ARGUMENTS` on a terminal with colours: its status, and all that it writes."""
    master, slave = pty.openpty()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm-256color")
        patch.delenv("NO_COLOR", raising=False)
        process = forked.start(arguments, folder, [Path(os.ttyname(slave))] * 2)
    said = b""
    while process.is_alive() or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.1)[0]:
            said += os.read(master, 65536)
    process.join()
    os.close(master)
    os.close(slave)
    return process.exitcode, said.decode()


@pytest.fixture(scope="module")
def plan() -> Plan:
    composed = compose(["recipe=w8a16"])
    return resolve(composed.recipe, composed.sources)


STAGES = {stage: {"perplexity": 20.0, "nll": 3.0, "tokens": 2040.0} for stage in ("float", "weights", "quantized")}


def _renamed(plan: Plan, text: str) -> Plan:
    first, *others = plan.modules
    named = first.model_copy(update={"name": text})
    recipe = plan.recipe.model_copy(update={"description": text})
    model = plan.model.model_copy(update={"path": text, "blocks": ""})
    return plan.model_copy(update={"modules": (named, *others), "recipe": recipe, "model": model, "notes": (text,)})


def _plan(console: Terminal, plan: Plan, text: str) -> None:
    for part in (plan_line(_renamed(plan, text)), *plan_tables(_renamed(plan, text))):
        console.print(part)


def _result(console: Terminal, plan: Plan, text: str) -> None:
    exported = Exported(Path(text), 0.0, 1, (text,), figures={"top1_agreement": 1.0})
    seconds = {"total": 1.0, text: 1.0}
    more = {"notes": (text,), "run_id": text, "run_url": text, "kernels": text, "exports": {text: exported}}
    show_result(console, RunResult(Path(text), STAGES, {"float": 1, "quantized": 1}, seconds, {}, **more), 1)


def _progress(console: Terminal, plan: Plan, text: str) -> None:
    progress = ConsoleProgress(console)
    progress.note(text)
    with progress.task(text, 2) as advance:
        advance()


def _sweep(console: Terminal, plan: Plan, text: str) -> None:
    good = {"kl": 0.1, "perplexity": 20.0, "perplexity_increase": 0.1, "size_mb": 4.0, "seconds": 1.0}
    rows = [
        SweepRow(1, {"data": text}, Outcome("1", FINISHED, text, text, good)),
        SweepRow(2, {"data": text}, Outcome("2", FAILED, text, reason=text)),
    ]
    sweep = ConsoleSweep(console)
    sweep.begun(Path(text), False)
    for row in rows:
        sweep.ended(row, 2)
    show_sweep(console, SweepResult(Path(text), make_table(rows, ["kl"]), text, text, (text,)))


def _verdict(console: Terminal, plan: Plan, text: str) -> None:
    differs = (Difference(text, text, text, text),)
    for part in verdict_tables(text, Verdict(False, differs, differs, text, {text: (1.0, 2.0)})):
        console.print(part)


def _tables(console: Terminal, plan: Plan, text: str) -> None:
    console.print(plain_table(text, [text], [[text]]))
    console.print(quality_table(Measured({text: STAGES["float"]}, {text: 1})))


@pytest.mark.parametrize("show", [_plan, _result, _progress, _sweep, _verdict, _tables])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "file"])
def test_what_commands_print(show: Callable[..., None], kind: str, terminal: bool, plan: Plan) -> None:
    colours = "truecolor" if terminal else None
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    console = Terminal(file=file, width=3000, force_terminal=terminal, color_system=colours)
    show(console, plan, KINDS[kind])
    file.seek(0)
    assert bare(plain(KINDS[kind])) in harmless(file.read(), terminal)


def test_a_line_of_a_table_is_as_wide_as_it_is_shown() -> None:
    console = Terminal(file=io.StringIO(), width=80)
    console.print(plain_table("", [f"{INVERSE}x", "b"], [[f"{INVERSE}{INVERSE}y", "end"], ["yyy", "end"]]))
    places = [line.index("end") for line in console.file.getvalue().splitlines()[1:]]
    assert places[0] == places[1] and len(places) == 2


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], None]) -> Path:
    """A folder with a run on a terminal, in which every name that can be is like `ALL`: `said`, and `status`."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "mine.yaml").write_text(f"name: mine\ndescription: {json.dumps(ALL)}\n", encoding="utf-8")
    (folder / ALL.replace("/", "")).symlink_to(DEMO)
    new_store(folder / f"out{ALL}" / "mlflow.db")
    words = ["recipe=w8a16", "evaluation.tokens=512", *overrides(), f"description={quoted(ALL)}"]
    status, said = on_terminal(["run", *words, f"model.path={quoted(model(folder))}"], folder)
    (folder / "said").write_text(said, encoding="utf-8", newline="")
    assert status == 0, said
    return folder


def model(folder: Path) -> str:
    return str(folder / ALL.replace("/", ""))


def quoted(text: str) -> str:
    return f'"{text}"'


def overrides() -> list[str]:
    return [f"paths.outputs={quoted('out' + ALL)}"]


def test_a_run_says_where_it_lies(work: Path) -> None:
    said = harmless((work / "said").read_bytes().decode(), terminal=True)
    for text in (model(work), f"model and record: {only_run(work / f'out{ALL}').relative_to(work)}"):
        assert bare(plain(text)) in said


def test_its_log(work: Path) -> None:
    log = (only_run(work / f"out{ALL}") / "log.txt").read_text(encoding="utf-8")
    harmless(log)
    assert all(re.match(r"\d{4}-|\s", line) for line in log.splitlines())


def test_its_page(work: Path) -> None:
    page = (only_run(work / f"out{ALL}") / "report.html").read_text(encoding="utf-8")
    harmless(page)
    assert "<script" not in page and bare(plain(ALL)) in bare(html.unescape(page))


def test_its_note_and_tags(work: Path) -> None:
    run = recorded(work / f"out{ALL}" / "mlflow.db")
    note = run.data.tags["mlflow.note.content"]
    harmless(note)
    head, *table = note.splitlines()
    assert (
        r"\[red\]" in head and r"\<script\>" in head and not head.startswith("|") and table[1].startswith("| stage |")
    )
    assert run.data.tags["description"] == ALL  # data, which MLflow's pages show as text


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "piped"])
@pytest.mark.parametrize(
    "command",
    [
        "compare w8a16 w8a16",
        "sync",
        "cache",
        "presets --config-dir .",
        "presets show recipe=mine --config-dir .",
        "plan recipe=w8a16 MODEL",
        "diff w8a16 w4a16_gptq MODEL",
        "recipe from-run w8a16",
        "verify w8a16",
        "cache --clear",
    ],
)
def test_commands_after_it(command: str, terminal: bool, work: Path) -> None:
    words = [f"model.path={quoted(model(work))}" if word == "MODEL" else word for word in command.split()]
    words += [] if "presets" in command else overrides()
    if terminal:
        status, said = on_terminal(words, work)
    else:
        done = forked.wrapq(words, work)
        status, said = done.returncode, done.stdout + done.stderr
    assert status == (1 if "diff" in command else 0), said
    if terminal or "from-run" not in command:
        harmless(said, terminal)


def test_what_programs_read_is_exact(work: Path) -> None:
    words = ["recipe=w8a16", f"description={quoted(ALL)}"]
    said = json.loads(forked.wrapq(["plan", "--json", *words], work).stdout)
    assert said["recipe"]["description"] == ALL
    given = forked.wrapq(["recipe", "from-run", "w8a16", "-o", "given.yaml", *overrides()], work)
    assert given.returncode == 0, given.stderr
    assert compose([f"recipe={work / 'given.yaml'}"]).recipe.description == ALL


class HostileOptions(Options):
    split: str = ""


class Hostile(TextSource):
    """A plug-in whose library says what it says."""

    Options = HostileOptions

    def check(self) -> None:
        pass

    def describe(self) -> str:
        return ALL

    def documents(self) -> Iterator[str]:
        raise RuntimeError(f"{ALL}\n2026-01-01 00:00:00,000 INFO    wrapq: all is well")


def _recipe(folder: Path) -> str:
    text = f"# @package _global_\nname: mine\n{json.dumps(ALL)}: 1\n"
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return str(folder / "mine.yaml")


def _lines(folder: Path) -> str:
    (folder / "data.jsonl").write_text(json.dumps({ALL: 1}), encoding="utf-8")
    return f"calibration=jsonl calibration.path={folder / 'data.jsonl'} recipe=w4a16_gptq"


def _header(folder: Path) -> str:
    with (folder / "ids.npy").open("wb") as file:
        numpy.lib.format.write_array_header_1_0(file, {"descr": ALL, "fortran_order": False, "shape": (2,)})
    return f"calibration=tokens calibration.path={folder / 'ids.npy'} recipe=w4a16_gptq"


MISTAKES: dict[str, Callable[[Path], str]] = {
    "a model's path": lambda folder: f"plan model.path={shlex.quote(quoted(ALL))}",
    "a run's name": lambda folder: f"compare {shlex.quote(ALL)}",
    "an override": lambda folder: f"plan {shlex.quote(ALL + '=1')}",
    "an option": lambda folder: f"plan {shlex.quote('--' + ALL)}",
    "a command": lambda folder: shlex.quote(ALL),
    "a recipe's key": lambda folder: f"plan recipe={_recipe(folder)}",
    "a field of the data": lambda folder: f"run {_lines(folder)} tracking=none paths.outputs={folder}",
    "an array's header": lambda folder: f"run {_header(folder)} tracking=none paths.outputs={folder}",
    "an override that is no export's": lambda folder: f"export w8a16 {shlex.quote(ALL + '=1')}",
    "an argument too many": lambda folder: f"schema {shlex.quote(ALL)}",
}


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "piped"])
@pytest.mark.parametrize("source", MISTAKES)
def test_errors(source: str, terminal: bool, tmp_path: Path) -> None:
    words = shlex.split(MISTAKES[source](tmp_path))
    if terminal:
        status, said = on_terminal(words, tmp_path)
    else:
        done = forked.wrapq(words, tmp_path)
        status, said = done.returncode, done.stderr
    assert status and "[red]" in harmless(said, terminal)
    assert "rror:" in said and "MarkupError" not in said


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "piped"])
def test_the_record_of_what_failed(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES._entries, "hostile", Hostile)
    words = ["run", "recipe=w4a16_gptq", "calibration.source=hostile", "tracking=none", f"paths.outputs={tmp_path}"]
    if terminal:
        status, said = on_terminal(words, tmp_path)
    else:
        done = forked.wrapq(words, tmp_path)
        status, said = done.returncode, done.stderr
    assert status == 70 and "[red]" in harmless(said, terminal)
    folder = only_run(tmp_path)
    log, page = ((folder / name).read_text(encoding="utf-8") for name in ("log.txt", "report.html"))
    assert "[red]" in harmless(log) and "[red]" in harmless(page)
    assert "<script" not in page and "\n2026-01-01" not in log
    assert ALL in json.loads((folder / "run.json").read_text())["reason"]


def test_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wrapq", "plan", "--debug", f"recipe={quoted(ALL)}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    harmless(done.stderr)


@pytest.mark.parametrize("way", ["import logging as log; log.getLogger('x').warning", "import warnings; warnings.warn"])
def test_what_libraries_tell(way: str, tmp_path: Path) -> None:
    program = f"from wrapq.cli import main; main(['presets'], standalone_mode=False); {way}({ALL!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "[red]" in harmless(done.stderr)


def test_a_terminal_that_knows_few_letters(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("name: mine\ndescription: naïve 量化\n", encoding="utf-8")
    command = [sys.executable, "-m", "wrapq", "presets", "--config-dir", str(tmp_path)]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "naïve \\u91cf\\u5316".encode("latin-1") in done.stdout


@pytest.mark.parametrize(("store", "status"), [("enabled=false", 0), ("uri=sqlite:///PATH/mlflow.db", 0), ("", 6)])
def test_a_folder_that_is_not_utf8(store: str, status: int, tmp_path: Path, new_store: Callable[[Path], None]) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    (folder / "recipes").mkdir(parents=True)
    (folder / "recipes" / "mine.yaml").write_text((RECIPES / "w8a16.yaml").read_text())
    new_store(tmp_path / "mlflow.db")
    words = ["run", "recipe=mine", "evaluation.tokens=512", "--config-dir", str(folder)]
    words += [f"tracking.{store}".replace("PATH", str(tmp_path))] if store else []
    done = forked.wrapq(words, folder)
    assert done.returncode == status, done.stderr
    assert ("modelandrecord:outputs" if status == 0 else "wouldmeananotherfile") in harmless(done.stdout + done.stderr)


def test_a_name_that_is_not_utf8_is_refused_in_an_override(tmp_path: Path) -> None:
    done = forked.wrapq(["plan", os.fsdecode(b"calibration.path=a\xff")], tmp_path)
    assert done.returncode == 2 and "calibration.path=a�: is not UTF-8" in done.stderr


class _Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": ALL}).encode()
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a tracking server that refuses everything, in words of its own."""
    serving = HTTPServer(("127.0.0.1", 0), _Refusing)
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    thread.join()
    serving.server_close()


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "piped"])
def test_what_a_tracking_server_says(terminal: bool, server: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    outbox = Outbox(tmp_path / "run")
    opening = {
        "name": "x",
        "key": "x",
        "tags": {},
        "time": 1,
        "uri": server,
        "experiment": "x",
        "outputs": str(tmp_path),
    }
    outbox.append(Event("open", opening))
    if terminal:
        status, said = on_terminal(["sync", "run"], tmp_path)
    else:
        done = forked.wrapq(["sync", "run"], tmp_path)
        status, said = done.returncode, done.stdout
    assert status == 6 and "[red]" in harmless(said, terminal)


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@SUM(1)", "\t=1", f"={INVERSE}"])
def test_the_table_of_a_sweep_holds_no_formula(text: str) -> None:
    rows = [SweepRow(1, {"data": text, "shift": "-1.5"}, Outcome("1", FAILED, text, reason=text))]
    (row,) = csv.DictReader(io.StringIO(make_table(rows, ["kl"]).to_csv()))
    assert row["data"] == row["folder"] == row["reason"] == f"'{plain(text)}"
    assert row["shift"] == "-1.5"
