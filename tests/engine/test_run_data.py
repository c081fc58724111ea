"""The data of a run: what the plan says of it, and that a run scores what the recipe asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import wrapq
from tests.data import templates
from tests.data.templates import byte_tokenizer
from tests.engine.record import SMALL
from wrapq.engine.evaluate import evaluate
from wrapq.engine.measure import forward_logits
from wrapq.engine.progress import Progress
from wrapq.engine.run_data import preview_data
from wrapq.recipe.compose import compose
from wrapq.resolve.resolve import resolve

AGAIN = {"role": "user", "content": "Again."}
TALK = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "This is it."}]
FEW = ("calibration.samples=4", "calibration.seq_len=32", "evaluation.seq_len=48")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """What makes a recipe read conversations, by a tokenizer that begins every text with two tokens."""
    folder = tmp_path_factory.mktemp("chats")
    byte_tokenizer(templates.CHATML, "[gMASK] <bos>").save_pretrained(folder / "tokenizer")
    rows = ([*TALK, AGAIN, TALK[1]][: 2 + i % 2 * 2] for i in range(40))
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    path = folder / "chats.jsonl"
    data = (f"{part}{key}" for part in ("calibration", "evaluation") for key in ("=jsonl", f".path={path}"))
    return (*SMALL, *FEW, f"model.tokenizer={folder / 'tokenizer'}", *data)


def preview(*overrides: str) -> list[str]:
    composed = compose(["recipe=w8a8_static", *overrides])
    return list(preview_data(resolve(composed.recipe, composed.sources), False))


def test_the_plan_says_what_is_read_and_cut(chats: tuple[str, ...], tmp_path: Path) -> None:
    first, made, *rest = preview(*chats, "evaluation.score=assistant", "evaluation.tokens=480")
    assert first.endswith("the first begins '[gMASK]', '<bos>', '<|im_start|>', 'u', 's', 'e'")
    assert made == (
        "calibration: 4 sequences in the 155 tokens of the first 3 documents, 35 tokens not used; "
        "a run draws 4 of at most 64"
    )
    assert rest[1:] == [
        "evaluation: 10 sequences in the 600 tokens of the first 10 documents; 120 tokens scored",
        "note: evaluation: the chat template does not mark the assistant's turns: "
        "they are what it writes in answer to each prompt",
        "note: evaluation: documents longer than 48 tokens, of which the rest is cut: 5 of 10",
    ]
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    short = preview(*SMALL, "calibration=text", f"calibration.path={text}", "calibration.seq_len=2")
    assert short[1] == "calibration: 2 sequences in the 5 tokens of the one document, 1 token not used"


class Told(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_measurement_by_itself_says_what_is_cut(chats: tuple[str, ...]) -> None:
    composed = compose(["recipe=w8a8_static", *chats, "evaluation.score=assistant", "evaluation.tokens=4800"])
    told = Told()
    metrics, _ = evaluate(composed.recipe, composed.settings, told)
    assert metrics["tokens"] == 12 * 40, "the first answer of each conversation; what follows is cut"
    assert told.notes[1:] == [
        f"{told.notes[1].partition(' gives ')[0]} gives 40 samples of 48 tokens, 100 were asked for",
        "documents longer than 48 tokens, of which the rest is cut: 20 of 40",
    ]


def test_a_run_scores_the_assistant_alone(chats: tuple[str, ...], tmp_path: Path) -> None:
    options = ("evaluation.score=assistant", "evaluation.seq_len=160", "evaluation.tokens=320")
    result = wrapq.run(
        "w8a8_static", [*chats, *options, "tracking=none", "runtime.kernels=reference", f"paths.outputs={tmp_path}"]
    )
    tokenizer, losses = AutoTokenizer.from_pretrained(result.folder), []
    model = wrapq.load(result.folder, "cpu")
    for talk in (TALK, [*TALK, AGAIN, TALK[1]]):
        words = [("[gMASK]<bos>", False)]
        for message in talk:
            answer = message["role"] == "assistant"
            words += [
                (f"<|im_start|>{message['role']}\n", False),
                (f"{message['content']}<|im_end|>", answer),
                ("\n", False),
            ]
        tokens = [(tokenizer(text, add_special_tokens=False).input_ids, scored) for text, scored in words]
        ids = torch.tensor([i for part, _ in tokens for i in part])
        answered = torch.tensor([scored for part, scored in tokens for _ in part])
        with torch.no_grad():
            log = forward_logits(model, ids[None])[0].double().log_softmax(-1)
        losses.append(-log[:-1].gather(-1, ids[1:, None])[:, 0][answered[1:]])
    expected, found = torch.cat(losses), result.metrics["quantized"]
    assert found["tokens"] == len(expected)
    assert found["nll"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert result.metrics["float"]["tokens"] == len(expected)
