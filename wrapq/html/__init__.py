"""Reports of runs and sweeps as HTML pages, made of plain records: one file each, which needs nothing beside it."""
