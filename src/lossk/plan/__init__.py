"""What a run will hold, and where its tiles live."""
