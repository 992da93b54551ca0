"""A fuzz of bad arguments: every public callable, each of its parameters, several dozen values that are no good there.

`table_*.py` hold one valid call of each; `rules.py` says what a parameter may be; `values.py` what is tried; `judge.py`
makes a call and says how it was refused. `python -m tests.fuzz` prints the counts; test_fuzz.py draws from it.
"""
