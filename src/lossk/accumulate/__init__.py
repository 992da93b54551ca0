"""Panels of draws into tiles or a factor, in memory or by way of the log of a run in progress."""
