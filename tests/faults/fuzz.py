"""Odd recipes, overrides, configurations, weight files, run folders and store entries, made of good ones by a seed.

    python -m tests.faults.fuzz --target configs --mutants 2000 --seed 0
    python -m tests.faults.fuzz --target configs --seed 0 --only 17

What a user may hand over must end in what was asked for or in a message of its kind: never as a defect of wrapq, with a
traceback, by a signal, or after more than a minute; and no code that came with it may run, nothing be written but in
the outputs folder. A mutant is the same for the same target, seed and number; `--only` shows what one says.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests import forked
from tests.faults import mutations
from tests.faults.runs import tiny, tiny_model
from wrapq.recipe.compose import compose
from wrapq.recipe.dump import to_yaml
from wrapq.tracking.base import flatten

SECONDS = 60
_MEMORY = 8 << 30  # of addresses, of which a process takes some for nothing
_ANSWERS = {0, 2, 3, 4, 5, 6, 7, 10, 11}
_DIFFERS = ("diff", "verify")  # for which 1 is an answer
_WHOLE = ("w4a4_rotated_gptq", "w8a8_smoothquant", "w2a16_autoround")  # of which every key is written
_LONG = (b"samples:", b"autoround", b"awq", b"spinquant")  # recipes in which a number may ask for hours
_LONG += (b"/export: onnx", b"/export: gguf", b"/export: executorch", b"/export: circle")  # and what translates models
FAMILIES = ("llama", "qwen2", "gpt2", "mixtral", "gemma2", "phi3", "opt")
_LOAD = """
import sys, wrapq
try: wrapq.load("{run}")
except wrapq.WrapqError as error: sys.exit(f"error: {error}")
"""
_MODEL = ("config.json", "manifest.json", "model.safetensors")
_RECORD = ("run.json", "plan.json", "modules.json", "recipe.lock.yaml")
_READS = (
    *[((*_MODEL, "tokenizer.json", "tokenizer_config.json"), ("evaluate", "{run}", "tracking=none"))] * 4,
    *[(_MODEL, ("-c", _LOAD))] * 4,
    *[(_RECORD, ("compare", "{run}", "{good}"))] * 4,
    *[(_RECORD[1:], ("diff", "{run}", "{good}"))] * 4,
    *[(_RECORD[3:], ("recipe", "from-run", "{run}"))] * 3,
    (_RECORD[3:], ("verify", "{run}", "tracking=none")),
    ((*_MODEL, "plan.json", "tokenizer.json"), ("export", "{run}", "export=compressed_tensors")),  # which takes seconds
)
"""What reads the folder of a run, with the files that it reads most."""
_OUT = re.compile(r"[+~]*(paths|tracking|launcher)")  # keys by which a command may write or wait elsewhere
_OWN_CODE = "from pathlib import Path\nPath({mark!r}).touch()\nfrom transformers import LlamaConfig as Own\n"


@dataclass(frozen=True)
class Verdict:
    """What a mutant's command came to.

    Attributes:
        words: the command.
        code: its exit status, None when it was ended.
        said: what it wrote.
        fault: what is wrong with that; empty when nothing is.
    """

    words: tuple[str, ...]
    code: int | None
    said: str
    fault: str


class Fuzzer:
    """Makes the mutants of one seed and runs each in a process of its own.

    Args:
        root: a folder for everything: `good`, what mutants are made of, and `home`, where each is made.
        seed: of all mutants.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.seed, self.good, self.home = seed, root / "good", root / "home"
        forked.prepare()
        import matplotlib.font_manager  # noqa: F401 - which makes a cache of its own at home

        self.tiny = tiny(root)
        for family in FAMILIES:
            tiny_model(self.good / family, family)
            (self.good / family / "own.py").write_text(_OWN_CODE.format(mark=str(self.home / "ran")))
        self.recipe_files = [
            path.read_bytes() for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
        ]
        self.recipe_files += [to_yaml(compose([f"recipe={name}"]).recipe).encode() for name in _WHOLE]
        outputs = self.good / "outputs"
        for recipe in ("w8a16", "w8a8_static"):
            done = forked.wrapq(["run", f"recipe={recipe}", *self._words(self.good / "llama", outputs)], self.good)
            assert done.returncode == 0, done.stderr
        self.run = sorted(path.parent for path in outputs.glob("w8a8_static/*/run.json"))[0]
        shutil.copy(self.good / "llama" / "own.py", self.run)
        self.keys = self._keys()

    def check(self, target: str, number: int, debug: bool = False) -> Verdict:
        """Make the mutant and run its command."""
        shutil.rmtree(self.home, ignore_errors=True)
        for name in ("tmp", "outputs"):
            (self.home / name).mkdir(parents=True)
        words = TARGETS[target](self, Random(f"{self.seed}/{target}/{number}"))
        before = self._listing()
        code, said, told = self._run([*words, "--debug"] if debug and words[0] != "-c" else words)
        return Verdict(tuple(words), code, said + told, self._fault(words, code, said + told, before))

    def _run(self, words: list[str]) -> tuple[int | None, str, str]:
        files = [self.home / "outputs" / name for name in (".said", ".told")]
        with _surroundings(self.home):
            process = forked.start(words, self.home, files)
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            return None, "", ""
        said, told = (file.read_text(errors="replace") if file.exists() else "" for file in files)
        return process.exitcode, said, told

    def _fault(self, words: list[str], code: int | None, said: str, before: dict[str, object]) -> str:
        after = self._listing()
        if written := sorted(name for name in {*before, *after} if before.get(name) != after.get(name)):
            return f"wrote {', '.join(written[:5])}"
        if code is None:
            return f"did not end in {SECONDS} s"
        if "Traceback" in said:
            return "a traceback"
        if code not in _ANSWERS and not (code == 1 and words[0] in (*_DIFFERS, "-c")):
            return f"exit status {code}"
        return ""

    def _listing(self) -> dict[str, object]:
        """All files that no command may write, with what changes when one does."""
        found = {}
        for folder, names, files in os.walk(self.home):
            names[:] = [name for name in names if Path(folder, name) != self.home / "outputs"]
            for name in (*names, *files):
                facts = os.lstat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = (facts.st_size, facts.st_mtime_ns if name in files else 0)
        return found

    def recipes(self, random: Random) -> list[str]:
        """A recipe's file."""
        good = random.choice(self.recipe_files)
        (self.home / "mine.yaml").write_bytes(mutations.damaged_yaml(good, random))
        long = any(word in good for word in _LONG)
        return self._resolved("plan" if long else _often_plan(random), "recipe=mine.yaml", self.good / "llama")

    def overrides(self, random: Random) -> list[str]:
        """Some overrides, of any key there is."""
        keys = self.keys
        words = [random.choice(("plan", "plan", "plan", "run", "sweep", "evaluate", "verify", "cache", "recipe"))]
        odd = [text for text in _odd_overrides(keys, random) if words[0] == "plan" or not _OUT.match(text)]
        if words[0] in ("run", "sweep", "plan"):
            fixed = [
                *self._words(self.good / "llama", self.home / "outputs"),
                random.choice(("recipe=w8a8_static", "recipe=w8a16")),
            ]
        else:
            fixed = [f"paths.outputs={self.home / 'outputs'}", "tracking=none"]
        words += ["from-run"] if words[0] == "recipe" else []
        words += [str(self.run)] if words[0] in ("evaluate", "verify", "recipe") else []
        return [*words, *fixed, "--", *odd] if random.random() < 0.7 else [*words, *fixed[:2], "--", *odd, *fixed[2:]]

    def configs(self, random: Random) -> list[str]:
        """The configuration of a model, or of its tokenizer."""
        model = self._copied(self.good / random.choice(FAMILIES))
        names = ("config.json",) * 8 + ("generation_config.json", "tokenizer_config.json", "tokenizer.json")
        self._damage(model / random.choice([name for name in names if (model / name).exists()]), random)
        return self._resolved(_often_plan(random), f"recipe={random.choice(('w8a16', 'w8a8_static'))}", model)

    def headers(self, random: Random) -> list[str]:
        """A model's weights."""
        model = self._copied(self.good / "llama")
        self._damage(model / "model.safetensors", random)
        if random.random() < 0.2:
            return [
                "evaluate",
                str(model),
                *self.tiny[:2],
                self.tiny[3],
                "tracking=none",
                f"paths.outputs={self.home / 'outputs'}",
            ]
        load = random.choice(("whole", "streaming"))
        return ["run", "recipe=w8a16", *self._words(model, self.home / "outputs"), f"runtime.load={load}"]

    def folders(self, random: Random) -> list[str]:
        """The folder of a finished run."""
        run = self._copied(self.run, "outputs/w8a8_static/run")
        read, words = random.choice(_READS)
        names = read if random.random() < 0.95 else sorted(file.name for file in run.iterdir())
        for name in random.sample(names, min(len(names), random.choice((1, 1, 1, 2)))):
            self._damage(run / name, random)
        words = [word.replace("{run}", str(run)).replace("{good}", str(self.run)) for word in words]
        if words[0] == "evaluate":
            words += [*self.tiny[:2], self.tiny[3]]
        return words if words[0] == "-c" else [*words, f"paths.outputs={self.home / 'outputs'}"]

    def store(self, random: Random) -> list[str]:
        """What is kept between runs."""
        cache = self._copied(self.run.parents[1] / "cache", "outputs/cache")
        files = [f for f in sorted(cache.rglob("*")) if f.is_file() and not f.name.startswith(".")]
        for file in files:
            if random.random() < 0.3:
                self._damage(file, random)
        if random.random() < 0.1:
            return ["cache", f"paths.outputs={self.home / 'outputs'}"]
        return ["run", "recipe=w8a8_static", *self._words(self.good / "llama", self.home / "outputs")]

    def _resolved(self, command: str, recipe: str, model: Path) -> list[str]:
        return [command, recipe, *self._words(model, self.home / "outputs")]

    def _words(self, model: Path, outputs: Path) -> list[str]:
        return [*self.tiny, f"model.path={model}", f"paths.outputs={outputs}"]

    def _keys(self) -> dict[str, object]:
        """Every key of a composed recipe and the settings, with its value."""
        composed = compose(["recipe=w8a8_static", "model=hf", "model.path=x", "tracking.uri=x", "runtime.threads=2"])
        groups = {
            "recipe": "w4a16_gptq",
            "export": "compressed_tensors",
            "scheme@rules.linear": "nvfp4",
            "sweep": "optuna",
        }
        groups |= {"calibration": "tokens", "evaluation": "jsonl", "+algorithm@stack.more": "rotate", "runtime": "cpu"}
        both = (composed.recipe.model_dump(mode="json"), composed.settings.model_dump(mode="json"))
        return {**dict(flatten(both[0])), **dict(flatten(both[1])), **groups, "stack.round": {"algorithm": "gptq"}}

    def _copied(self, folder: Path, name: str = "given") -> Path:
        return Path(shutil.copytree(folder, self.home / name, copy_function=os.link))  # `_damage` makes new files

    @staticmethod
    def _damage(file: Path, random: Random) -> object:
        kinds = {".json": mutations.damaged_json, ".yaml": mutations.damaged_yaml}
        kinds[".safetensors"] = mutations.damaged_safetensors
        raw = file.read_bytes()
        file.unlink()
        if (kind := random.random()) < 0.04:
            return file.mkdir() if kind < 0.02 else None
        return file.write_bytes(kinds.get(file.suffix, mutations.damaged_bytes)(raw, random))


TARGETS: dict[str, Callable[[Fuzzer, Random], list[str]]] = {
    "recipes": Fuzzer.recipes,
    "overrides": Fuzzer.overrides,
    "configs": Fuzzer.configs,
    "headers": Fuzzer.headers,
    "folders": Fuzzer.folders,
    "store": Fuzzer.store,
}


def _often_plan(random: Random) -> str:
    return random.choice(("plan", "plan", "plan", "run"))


def _odd_overrides(keys: Mapping[str, object], random: Random) -> Iterator[str]:
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        key, value = random.choice(list(keys)), random.choice((*mutations.ODD, *keys.values()))
        if random.random() < 0.4:  # what may be meant
            value = random.choice([v for v in (*keys.values(), *mutations.ODD) if type(v) is type(keys[key])])
        text = f"{random.choice(('', '', '', '', '+', '++', '~'))}{key}={_word(value)}"
        text = mutations.damaged_text(text, random) if random.random() < 0.15 else text
        yield text.replace("\0", "?").encode(errors="replace").decode()  # the system hands over no others


def _word(value: object) -> str:
    """The value as an override says it."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_word(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, str):
        return value if value.isidentifier() else "'" + value.replace("'", "\\'") + "'"
    return json.dumps(value)


@contextmanager
def _surroundings(home: Path) -> Iterator[None]:
    """A process that is forked in the context has `home` for its own, and not all of the memory."""
    before, environment, limit = tempfile.tempdir, dict(os.environ), resource.getrlimit(resource.RLIMIT_AS)
    os.environ |= {"HOME": str(home), "TMPDIR": str(home / "tmp"), "HF_HUB_OFFLINE": "1"}
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, limit[1]))
    try:
        yield
    finally:
        tempfile.tempdir = before
        os.environ.clear()
        os.environ.update(environment)
        resource.setrlimit(resource.RLIMIT_AS, limit)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz")
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mutant, of which all is shown")
    asked = parser.parse_args()
    codes, start = Counter[int | None](), time.perf_counter()
    faults = 0
    with tempfile.TemporaryDirectory() as root:
        fuzzer = Fuzzer(Path(root), asked.seed)
        for number in range(asked.mutants) if asked.only is None else [asked.only]:
            verdict = fuzzer.check(asked.target, number, debug=asked.only is not None)
            codes[verdict.code] += 1
            if verdict.fault or asked.only is not None:
                faults += 1
                last = verdict.said if asked.only is not None else "\n".join(verdict.said.strip().splitlines()[-3:])
                print(f"{asked.target} {number}: {verdict.fault}: {' '.join(verdict.words)[:300]}\n{last}", flush=True)
    shown = ", ".join(f"{count} with {code}" for code, count in sorted(codes.items(), key=str))
    print(
        f"{asked.target}: {sum(codes.values())} mutants, {faults} faults, {time.perf_counter() - start:.0f} s ({shown})"
    )
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
