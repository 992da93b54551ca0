"""One run, by one process or many: what is asked for, chosen, foreseen and written down."""
