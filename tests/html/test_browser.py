"""The pages in a real browser: rendered, silent on the console, without a request, and all within reach of Tab."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import wrapq
from tests.engine.record import SMALL
from tests.html.browser import chromium
from tests.html.test_sweep import RECORDS
from wrapq.html.sweep_page import render_sweep

REACHABLE = "a[href], summary, [tabindex='0'], button, input, select"
SPILLS = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, .skip, svg')
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 90))"""
CONTRAST = """() => {
  const lum = c => { const v = c.map(x => x / 255).map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
                     return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
  const rgb = s => s.match(/[\\d.]+/g).map(Number);
  const over = (f, b) => f.length < 4 ? f : [0, 1, 2].map(i => f[3] * f[i] + (1 - f[3]) * b[i]);
  const ground = e => { if (!e) return rgb(getComputedStyle(document.body).backgroundColor);
                        const own = rgb(getComputedStyle(e).backgroundColor);
                        return own.length > 3 && own[3] === 0 ? ground(e.parentElement)
                             : over(own, own.length > 3 ? ground(e.parentElement) : own); };
  return [...document.querySelectorAll('p, td, th, dt, dd, h1, h2, h3, a, summary, li, caption, code, span')].map(e => {
    const a = lum(rgb(getComputedStyle(e).color)), b = lum(ground(e));
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 80)]; })
    .filter(([ratio]) => ratio < 4.5); }"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    outputs = tmp_path_factory.mktemp("outputs")
    result = wrapq.run("demo", [*SMALL, "tracking=none", f"paths.outputs={outputs}"])
    return {"run": result.folder / "report.html", "sweep": render_sweep(RECORDS, outputs / "sweep.html")}


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_page_in_the_browser(name: str, browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (1100, 375):
            page.set_viewport_size({"width": width, "height": 800})
            page.goto(pages[name].as_uri())
            assert page.evaluate(SPILLS) == [], f"{scheme}, {width}"
        assert page.evaluate(CONTRAST) == [], scheme
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    assert said == []
    assert set(asked) == {pages[name].as_uri()}
    check_keyboard(page)
    check_structure(page)
    page.close()


def check_keyboard(page: Any) -> None:
    """Tab reaches everything that can be acted on, once round."""
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    wanted = page.evaluate(f"[...document.querySelectorAll({json.dumps(REACHABLE)})].filter(e => e.checkVisibility())"
                           ".map((e, i) => { e.dataset.at = i; return i; })")  # fmt: skip
    reached = []
    for _ in wanted:
        page.keyboard.press("Tab")
        reached.append(int(page.evaluate("document.activeElement.dataset.at ?? -1")))
    assert reached == wanted


def check_structure(page: Any) -> None:
    """One first heading, no level skipped, pictures that say what they show, tables with headings, links that lead."""
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(e => Number(e.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.evaluate("[...document.querySelectorAll('svg')].every(e => e.getAttribute('aria-label')?.length > 5)")
    assert page.evaluate(
        "[...document.querySelectorAll('table')].every(e => e.caption && e.querySelector('th[scope]'))"
    )
    assert page.evaluate("[...document.querySelectorAll('a')].every(e => document.querySelector(e.hash))")
    assert page.evaluate("document.documentElement.lang") == "en"
