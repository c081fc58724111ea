"""Copies of a converted model in the formats of other projects; see `wrapq.resolve.exporter` for what one declares."""
