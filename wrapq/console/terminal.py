"""The console of all commands: what stands in a text from outside is shown, not done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from wrapq.foreign import plain


class Terminal(Console):
    """A rich console that knows styles, and neither markup nor names of emoji in text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text that `text` is shown as, and measured as."""
        return super().render_str(plain(text), **options)

    def on_broken_pipe(self) -> None:
        """Nobody reads on: raise the error, of which the command makes an exit status."""
        raise

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of what is printed, or of a part of it: a cell, a title, a bar's text."""
        if isinstance(renderable, Text) and (shown := plain(renderable.plain)) != renderable.plain:
            renderable = renderable.copy()
            renderable.plain = shown  # as long as before, so that each style is where it was
        return super().render(renderable, options)
