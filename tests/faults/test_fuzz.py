"""A few mutants of each kind; `python -m tests.faults.fuzz` makes more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fuzz import TARGETS, Fuzzer

FEW, MORE = 5, 200


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"), seed=0)


def check(fuzzer: Fuzzer, target: str, numbers: range) -> None:
    verdicts = {number: fuzzer.check(target, number) for number in numbers}
    faults = [f"{n}: {v.fault}: {' '.join(v.words)}\n{v.said}" for n, v in verdicts.items() if v.fault]
    assert not faults, f"{target}: " + "\n".join(faults)


@pytest.mark.parametrize("target", TARGETS)
def test_no_mutant_is_a_defect(target: str, fuzzer: Fuzzer) -> None:
    check(fuzzer, target, range(FEW))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
def test_no_mutant_of_many_is_a_defect(target: str, fuzzer: Fuzzer) -> None:
    check(fuzzer, target, range(FEW, FEW + MORE))


def test_what_no_mutant_may_do_is_seen(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def told(program: str) -> str:
        monkeypatch.setitem(TARGETS, "it", lambda *_: ["-c", program])
        return fuzzer.check("it", 0).fault

    assert told("") == ""
    assert told("open('ran', 'w').close()").startswith("wrote ") and told("1/0") == "a traceback"
    assert told("import os; os._exit(70)") == "exit status 70"
    assert told("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == "exit status -9"
    monkeypatch.setattr("tests.faults.fuzz.SECONDS", 0.5)
    assert told("import time; time.sleep(9)") == "did not end in 0.5 s"
