"""One algorithm, one file: its settings, and its chain, which yields after each step."""
