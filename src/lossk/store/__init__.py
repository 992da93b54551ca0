"""What a `.lossk` store consists of, read and written as data."""
