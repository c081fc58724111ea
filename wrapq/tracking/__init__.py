"""Run tracking: parameters, metrics, curves, data sets and artifacts, in MLflow or nowhere."""
