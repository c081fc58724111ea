"""Copies of a converted model in the formats of other projects; see `wrapq.export.base` for what one declares."""
