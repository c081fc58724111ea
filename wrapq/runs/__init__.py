"""Run folders: written whole, read back as records, resumed when a run was killed."""
