"""The samples: read once, in a fixed order, into resident tensors."""
