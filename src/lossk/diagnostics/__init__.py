"""Whether a run can be trusted: numbers, their errors, and a verdict in words."""
