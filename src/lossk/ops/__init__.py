"""One file per operation: argument checks, a plain torch reference, and dispatch to faster backends."""
