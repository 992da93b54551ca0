"""Measurements before a run, and the settings that follow from them."""
