"""Benchmarks: medians with 20/80 percentiles, ratios measured in one run, and the floor each time is judged by."""
