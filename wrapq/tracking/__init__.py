"""The lab book of runs: parameters, metrics, curves, data sets and artifacts, in MLflow or nowhere."""

from wrapq.tracking.base import Tracker, TrackingError
from wrapq.tracking.stores import make_tracker, store_uri, ui_command

__all__ = ["Tracker", "TrackingError", "make_tracker", "store_uri", "ui_command"]
