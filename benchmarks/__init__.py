"""Costs as ratios, measured side by side in one run. `python -m benchmarks.run` writes JSON into `results`."""
