"""What a `Trainer` is joined by: one file a callback."""
