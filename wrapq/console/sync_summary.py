"""What became of outboxes, in a line each."""

from __future__ import annotations

from wrapq.tracking.sync import Synced


def synced_line(synced: Synced) -> str:
    """`FOLDER: 12 records sent`, and what is left and why."""
    if synced.state == "in use":
        return f"{synced.folder}: {synced.reason}"
    parts = [f"{synced.folder}: {synced.count} records sent" if synced.count else f"{synced.folder}: nothing to send"]
    if synced.left:
        parts = [f"{synced.folder}: {synced.count} records sent, {synced.left} left"]
    if synced.reason:
        parts.append(synced.reason)
    if synced.run_url and not synced.left:
        parts.append(synced.run_url)
    return ": ".join(parts)
