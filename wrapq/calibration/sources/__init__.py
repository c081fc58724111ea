"""Where calibration and evaluation text comes from: one file and one registered class per kind of source."""

from wrapq.calibration.sources.base import SOURCES, Source, TextSource, TokenSource, make_source

__all__ = ["SOURCES", "Source", "TextSource", "TokenSource", "make_source"]
