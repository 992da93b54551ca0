"""The loss kernel as its user reads it, in either form. Never samples."""
