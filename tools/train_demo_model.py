"""Train the small Llama model that ships with wrapq (``wrapq/assets/demo``).

The text is documentation under permissive licences: the docstrings of the Python standard
library that runs this script (PSF-2.0), and the Debian packages ``python-django-doc``
(BSD-3-Clause) and ``rust-doc`` (MIT or Apache-2.0), fetched with ``apt-get download`` and
unpacked without installing.  Other text can be given instead, as folders of ``.txt`` and
``.html`` files, one document a file.

Documents are split between training, calibration and held-out text, no paragraph of 60 or more
characters occurs twice, and everything is drawn from one seed: same text, versions of libraries,
arguments and machine give the same weights.  The folder is complete and loadable from the first
checkpoint on, and every file in it is replaced atomically.

    python tools/train_demo_model.py --out demo
    python tools/train_demo_model.py --out demo --text-dir my/texts --steps 500

On a CPU with glibc this environment makes training several times faster:
``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456``.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import math
import os
import random
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger("train_demo_model")

EOS = "<|endoftext|>"
CONTEXT = 256  # tokens in a training window and in a window of the held-out evaluation


# ---------------------------------------------------------------- text


@dataclass(frozen=True)
class Notice:
    """Where a licence's text is found: a file, and the lines it starts at and ends before."""

    path: str
    start: str = ""
    end: str = ""


@dataclass(frozen=True)
class Source:
    """A Debian package with HTML documentation: where its pages are, and its licence."""

    package: str
    licence: str
    owner: str
    notice: Notice
    folders: tuple[str, ...]


STDLIB = "Python standard library"
STDLIB_NOTICE = Notice("LICENSE.txt", "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2", "BEOPEN.COM LICENSE")
RUST_BOOKS = ("book", "edition-guide", "nomicon", "reference", "rust-by-example", "rustc", "rustdoc")
DJANGO_PARTS = ("faq", "howto", "internals", "intro", "misc", "ref", "releases", "topics")
SOURCES = (
    Source(
        "python-django-doc",
        "BSD-3-Clause",
        "Django Software Foundation and individual contributors",
        Notice("usr/share/doc/python-django-doc/copyright", "License: BSD-3-Clause\n Redistribution"),
        tuple(f"usr/share/doc/python-django-doc/html/{part}" for part in DJANGO_PARTS),
    ),
    Source(
        "rust-doc",
        "MIT or Apache-2.0",
        "The Rust Project Developers",
        Notice("usr/share/doc/rust-doc/html/LICENSE-MIT.txt"),
        tuple(f"usr/share/doc/rust-doc/html/{book}" for book in RUST_BOOKS),
    ),
)


@dataclass(frozen=True)
class Document:
    """One page or module: where it came from, its name there, and its text."""

    source: str
    name: str
    text: str


class PageText(HTMLParser):
    """Collect the readable text of the main part of a page, one block of prose a paragraph."""

    HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
    BLOCKS = frozenset(("p", "li", "dt", "dd", "pre", "div", "section", "blockquote", "ul", "ol", "dl", "br"))
    VOID = frozenset(("br", "img", "hr", "input", "meta", "link", "col", "wbr"))
    SKIP = frozenset(("script", "style", "table", "nav", "button", "svg", "head", "footer"))
    SKIP_CLASSES = frozenset(
        ("headerlink", "boring", "sphinxsidebar", "sidebar", "nav-chapters", "related", "contents", "toctree-wrapper")
    )
    MAX_CODE_LINES = 20

    def __init__(self, whole: bool) -> None:
        super().__init__(convert_charrefs=True)
        self.whole = whole  # take all of the page, not only what is marked as its main part
        self.open: list[tuple[str, bool, bool]] = []  # tag, inside the main part, skipped
        self.parts: list[str] = []
        self.code: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element; a block ends the paragraph before it."""
        if tag in self.BLOCKS | self.HEADINGS:
            self._break()
        if tag in self.VOID:
            return
        main, skip = self._state(tag, dict(attrs))
        self.open.append((tag, main, skip))
        if tag == "pre" and main and not skip:
            self.code = []

    def _state(self, tag: str, attrs: dict[str, str | None]) -> tuple[bool, bool]:
        """Whether this element is inside the main part, and whether it is skipped."""
        classes = set((attrs.get("class") or "").split())
        _, main, skip = self.open[-1] if self.open else ("", self.whole, False)
        main = main or tag == "main" or attrs.get("role") == "main" or "yui-b" in classes
        return main, skip or tag in self.SKIP or bool(classes & self.SKIP_CLASSES)

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost element of this name, and what was left open in it."""
        if tag == "pre" and self.code is not None:
            self._end_code()
        if any(name == tag for name, _, _ in self.open):
            while self.open.pop()[0] != tag:
                pass
        if tag in self.BLOCKS | self.HEADINGS:
            self._break()

    def handle_data(self, data: str) -> None:
        """Keep text of the main part that is not skipped."""
        if not self.open or not self.open[-1][1] or self.open[-1][2]:
            return
        if self.code is not None:
            self.code.append(data)
        else:
            self.parts.append(re.sub(r"\s+", " ", data))

    def _break(self) -> None:
        if self.code is None:
            self.parts.append("\n\n")

    def _end_code(self) -> None:
        lines = "".join(self.code or []).strip("\n").splitlines()
        self.code = None
        lines = [line.rstrip() for line in lines if line.strip()]
        if len(lines) <= self.MAX_CODE_LINES:
            self.parts.append("\n\n" + "\n".join(lines) + "\n\n")

    def text(self) -> str:
        """The text collected so far."""
        return "".join(self.parts)


def html_text(html: str, whole: bool = False) -> str:
    """Plain text of the main part of an HTML page, or of all of it."""
    parser = PageText(whole)
    parser.feed(html)
    parser.close()
    return parser.text()


def docstrings(path: Path) -> str:
    """All docstrings of one Python file, in the order of the file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def stdlib_documents() -> Iterator[Document]:
    """Docstrings of the standard library that runs this script, one document a module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    leave = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if not leave & set(path.relative_to(root).parts):
            yield Document(STDLIB, str(path.relative_to(root)), docstrings(path))


def fetch_package(package: str, cache: Path) -> Path:
    """Download a Debian package and unpack it under the cache, once; return the root."""
    root = cache / package
    if not root.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=cache, check=True)
        archive = sorted(cache.glob(f"{package}_*.deb"))[-1]
        subprocess.run(["dpkg", "-x", archive.name, package], cwd=cache, check=True)
    return root


def package_documents(source: Source, cache: Path) -> Iterator[Document]:
    """The pages of one Debian package."""
    root = fetch_package(source.package, cache)
    for folder in source.folders:
        for path in sorted((root / folder).rglob("*.html")):
            if path.name != "print.html":  # mdbook: the whole book once more
                text = html_text(path.read_text(encoding="utf-8", errors="replace"))
                yield Document(source.package, str(path.relative_to(root)), text)


def folder_documents(folder: Path) -> Iterator[Document]:
    """The .txt and .html files of a given folder."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".txt", ".html"}:
            raw = path.read_text(encoding="utf-8", errors="replace")
            text = html_text(raw, whole="<main" not in raw) if path.suffix == ".html" else raw
            yield Document(str(folder), str(path.relative_to(folder)), text)


def clean(text: str, seen: set[str]) -> str:
    """Tidy white space, drop paragraphs that are tables or rules or were seen before."""
    kept = []
    for block in re.split(r"\n\s*\n", text.replace("\u00a0", " ").replace("¶", "")):
        lines = [line.rstrip() for line in block.strip("\n").splitlines()]
        para = "\n".join(lines) if len(lines) > 1 else block.strip()
        key = " ".join(para.split())
        letters = sum(char.isalpha() for char in key)
        if letters < 0.6 * (len(key) - key.count(" ")) or not key or "\ufffd" in key:
            continue
        if len(key) < 60 or key not in seen:
            seen.add(key)
            kept.append(para)
    return "\n\n".join(kept)


def collect(text_dirs: list[Path], cache: Path) -> list[Document]:
    """All documents, cleaned, those with hardly any text left out."""
    streams: list[Iterable[Document]] = [folder_documents(folder) for folder in text_dirs]
    if not streams:
        streams = [stdlib_documents(), *(package_documents(s, cache) for s in SOURCES)]
    seen: set[str] = set()
    documents = []
    for doc in (doc for stream in streams for doc in stream):
        text = clean(doc.text, seen)
        if len(text) >= 400:
            documents.append(Document(doc.source, doc.name, text))
    if not documents:
        raise SystemExit("no text found: give folders with .txt or .html files of 400 characters or more")
    return documents


@dataclass(frozen=True)
class Split:
    """Documents of the three parts; no document is in two."""

    train: list[Document]
    calib: list[Document]
    heldout: list[Document]


def take(documents: list[Document], size: int, largest: int = 40_000) -> list[Document]:
    """Remove documents from the end of the list up to a total of `size` bytes; return them."""
    taken: list[Document] = []
    left = size
    for index in range(len(documents) - 1, -1, -1):
        length = len(documents[index].text.encode()) + 2
        if length <= min(left, largest):
            left -= length
            taken.append(documents.pop(index))
        if left < 500:
            break
    return taken


def split(documents: list[Document], seed: int) -> Split:
    """Shuffle by the seed, then set aside the held-out and the calibration documents."""
    rest = sorted(documents, key=lambda doc: (doc.source, doc.name))
    random.Random(seed).shuffle(rest)
    total = sum(len(doc.text) for doc in rest)
    heldout = take(rest, min(250_000, total // 10))
    calib = take(rest, min(400_000, total // 8))
    return Split(train=rest, calib=calib, heldout=heldout)


# ---------------------------------------------------------------- tokenizer and model


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips; id 0 is padding, start and end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocab_size: int) -> LlamaForCausalLM:
    """The demo architecture, every dimension a multiple of 128; weights from torch's seed."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> torch.Tensor:
    """All documents as one row of ids, each closed by the end token."""
    ids: list[int] = []
    for doc in documents:
        ids += tokenizer(doc.text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(0)
    return torch.tensor(ids, dtype=torch.long)


def batches(stream: torch.Tensor, batch: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """`steps` batches of windows; each pass shifts the windows' start and shuffles them."""
    rng = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for _ in range(steps):
        if len(queue) < batch:
            first = int(torch.randint(CONTEXT, (1,), generator=rng))
            starts = torch.arange(first, len(stream) - CONTEXT, CONTEXT)
            queue += starts[torch.randperm(len(starts), generator=rng)].tolist()
        chosen, queue = queue[:batch], queue[batch:]
        yield torch.stack([stream[start : start + CONTEXT] for start in chosen])


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Settings:
    """What decides the weights, given the text."""

    steps: int
    batch: int
    lr: float
    warmup: int
    weight_decay: float
    seed: int


def optimizer_for(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def lr_factor(step: int, settings: Settings) -> float:
    """Linear warmup, then a cosine down to 2% of the peak."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def loss_on(model: LlamaForCausalLM, ids: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of tokens 2..n of each window, predicted from those before them."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction=reduction)


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, ids: torch.Tensor, lr: float) -> float:
    """One update at this learning rate; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = loss_on(model, ids)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def train(model: LlamaForCausalLM, stream: torch.Tensor, settings: Settings, out: Path, every: float) -> float:
    """Train and save a checkpoint every `every` seconds and at the end; return seconds used."""
    optimizer = optimizer_for(model, settings)
    start = saved = time.monotonic()
    running = 0.0
    data = batches(stream, settings.batch, settings.steps, settings.seed)
    for step, ids in enumerate(data):
        loss = train_step(model, optimizer, ids, settings.lr * lr_factor(step, settings))
        running = loss if step == 0 else 0.98 * running + 0.02 * loss
        if step % 50 == 0:
            log.info("step %d loss %.3f, %.0f s", step, running, time.monotonic() - start)
        if step == 0 or time.monotonic() - saved > every:
            save_model(model, out)
            saved = time.monotonic()
    save_model(model, out)
    return time.monotonic() - start


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: list[int]) -> float:
    """Perplexity over consecutive windows of CONTEXT tokens, a shorter last one dropped."""
    count = len(ids) // CONTEXT
    windows = torch.tensor(ids[: count * CONTEXT]).reshape(count, CONTEXT)
    total = sum(float(loss_on(model, part, "sum")) for part in windows.split(8))
    return math.exp(total / (count * (CONTEXT - 1)))


# ---------------------------------------------------------------- files


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then move it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def move_all(folder: Path, out: Path) -> None:
    """Move every file of a folder on the same file system into `out`, each atomically."""
    for path in sorted(folder.iterdir()):
        os.chmod(path, 0o644)
        os.replace(path, out / path.name)


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """Save config, generation config and bfloat16 weights; the model itself stays float32."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory(dir=out) as folder:
        copy.bfloat16().save_pretrained(folder)
        move_all(Path(folder), out)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save the tokenizer's files."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer_config.json")
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every transformers release knows
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        move_all(Path(folder), out)


def save_text(documents: list[Document], path: Path) -> None:
    """Write documents to one text file, a blank line between them."""
    write_atomic(path, "\n\n".join(doc.text for doc in documents) + "\n")


README = """# The demo model

A small Llama model ({parameters:,} parameters, bfloat16) with its tokenizer and two texts, so that
wrapq's default recipe needs no network. It writes recognisable documentation English and knows nothing.

LlamaForCausalLM: hidden 256, intermediate 512, 4 layers, 8 heads, 4 key-value heads, untied head,
byte-level BPE of {vocab} tokens, at most 512 positions, trained on windows of 256 tokens.
Token 0, `{eos}`, is padding, start and end.

| file | what |
|---|---|
| `calib.txt` | calibration text: {calib_docs} documents, {calib_bytes:,} bytes |
| `heldout.txt` | evaluation text: {heldout_docs} documents, {heldout_bytes:,} bytes |

No document is in two of training, calibration and held-out text, and no paragraph of 60 characters
or more occurs twice in all of them.

## Figures

| | |
|---|---|
| parameters | {parameters:,} |
| training text | {train_docs:,} documents, {train_bytes:,} bytes, {train_tokens:,} tokens |
| tokens seen | {seen:,} ({passes:.2f} passes, {steps:,} steps of {batch} x 256) |
| training time | {seconds:.0f} s, CPU, {threads} thread |
| held-out perplexity | {ppl:.2f} |

Perplexity is over the whole of `heldout.txt` ({heldout_tokens:,} tokens) in non-overlapping windows of 256,
in float32 arithmetic on the bfloat16 weights.

## Text and licences

| source | licence | training | calibration | held-out |
|---|---|---|---|---|
{sources}

Bytes of cleaned text: no tables, no code blocks over {code} lines, no mark-up. `calib.txt` and
`heldout.txt` quote these sources, so the notices at the end of this page go with them.

## Made by

    {command}

with Python {python}, torch {torch} (CPU), seed {seed}.
{notices}"""


def licence_of(source: str) -> str:
    """The licence of a source; text given on the command line is the caller's to know."""
    known = {item.package: item.licence for item in SOURCES} | {STDLIB: "PSF-2.0"}
    return known.get(source, "as given")


def notice_text(root: Path, notice: Notice) -> str:
    """The text of a licence, as an indented block."""
    path = root / notice.path
    if not path.exists():
        return "    (not found beside the text)"
    text = path.read_text(encoding="utf-8")
    text = text[text.index(notice.start) :]
    text = text[: text.index(notice.end)] if notice.end else text
    return textwrap.indent(text.strip("\n").replace("<NAME>", "Django"), "    ")


def notices(cache: Path) -> str:
    """Copyright and licence texts of the default sources, for the end of the README."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sections = [("Python", "Python Software Foundation", notice_text(stdlib, STDLIB_NOTICE))]
    sections += [(s.package, s.owner, notice_text(cache / s.package, s.notice)) for s in SOURCES]
    return "".join(f"\n## Notice: {name}\n\nCopyright {owner}.\n\n{text}\n" for name, owner, text in sections)


def size(documents: Iterable[Document]) -> int:
    """Bytes of text in these documents."""
    return sum(len(doc.text.encode()) for doc in documents)


def described(source: str, cache: Path) -> str:
    """A source's name with the version that was read."""
    if source == STDLIB:
        return f"docstrings of the Python {sys.version.split()[0]} standard library"
    if source not in {item.package for item in SOURCES}:
        return source
    found = sorted(cache.glob(f"{source}_*.deb"))
    version = found[-1].name.split("_")[1].replace("%3a", ":") if found else ""
    return f"Debian `{source}` {version}".strip()


def source_table(parts: Split, cache: Path) -> str:
    """One table row a source: licence and bytes in each part."""
    names = sorted({doc.source for doc in [*parts.train, *parts.calib, *parts.heldout]})
    rows = []
    for name in names:
        sizes = (f"{size(d for d in part if d.source == name):,}" for part in (parts.train, parts.calib, parts.heldout))
        rows.append(f"| {described(name, cache)} | {licence_of(name)} | {' | '.join(sizes)} |")
    return "\n".join(rows)


def text_figures(parts: Split) -> dict[str, int]:
    """Number of documents and bytes of each part, by the names the README uses."""
    named = {"train": parts.train, "calib": parts.calib, "heldout": parts.heldout}
    figures = {f"{name}_docs": len(docs) for name, docs in named.items()}
    return figures | {f"{name}_bytes": size(docs) for name, docs in named.items()}


def evaluate_saved(out: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[float, int]:
    """Held-out perplexity of the weights as saved, and the number of held-out tokens."""
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    text = (out / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return perplexity(model, ids), len(ids)


# ---------------------------------------------------------------- command line


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--text-dir", type=Path, action="append", default=[], help="own text")
    parser.add_argument("--cache", type=Path, default=Path(".demo-text"), help="packages")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds")
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> tuple[Split, PreTrainedTokenizerFast]:
    """Collect and split the text, write the two shipped texts, train and save the tokenizer."""
    args.out.mkdir(parents=True, exist_ok=True)
    parts = split(collect(args.text_dir, args.cache), args.seed)
    save_text(parts.calib, args.out / "calib.txt")
    save_text(parts.heldout, args.out / "heldout.txt")
    tokenizer = train_tokenizer((doc.text for doc in parts.train), args.vocab)
    save_tokenizer(tokenizer, args.out)
    log.info("text: %s", text_figures(parts))
    return parts, tokenizer


def training_figures(model: LlamaForCausalLM, stream: torch.Tensor, settings: Settings) -> dict[str, float]:
    """Figures of the model and its training, by the names the README uses."""
    seen = settings.steps * settings.batch * CONTEXT
    return {
        "parameters": model.num_parameters(),
        "vocab": model.config.vocab_size,
        "train_tokens": len(stream),
        "seen": seen,
        "passes": seen / len(stream),
        "steps": settings.steps,
        "batch": settings.batch,
        "seed": settings.seed,
    }


def write_readme(args: argparse.Namespace, parts: Split, figures: dict[str, float]) -> None:
    """Write the README beside the model."""
    text = README.format(
        **text_figures(parts),
        **figures,
        eos=EOS,
        sources=source_table(parts, args.cache),
        notices="" if args.text_dir else notices(args.cache),
        code=PageText.MAX_CODE_LINES,
        threads=args.threads,
        command="python tools/train_demo_model.py " + shlex.join(sys.argv[1:]),
        python=sys.version.split()[0],
        torch=torch.__version__.split("+")[0],
    )
    write_atomic(args.out / "README.md", text)


def main() -> None:
    """Make the folder."""
    args = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    parts, tokenizer = prepare(args)
    torch.manual_seed(args.seed)
    model = build_model(len(tokenizer))
    stream = token_stream(tokenizer, parts.train)
    settings = Settings(args.steps, args.batch, args.lr, args.warmup, args.weight_decay, args.seed)
    figures = training_figures(model, stream, settings)
    log.info("%d training tokens", len(stream))
    figures["seconds"] = train(model, stream, settings, args.out, args.save_every)
    figures["ppl"], figures["heldout_tokens"] = evaluate_saved(args.out, tokenizer)
    write_readme(args, parts, figures)
    log.info("held-out perplexity %.2f after %.0f s", figures["ppl"], figures["seconds"])


if __name__ == "__main__":
    main()
