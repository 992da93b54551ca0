"""The user's model, frozen, and its loss of each sample or token."""
