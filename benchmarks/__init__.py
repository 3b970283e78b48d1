"""Measurements of this project against named baselines: `python -m benchmarks --help`."""
