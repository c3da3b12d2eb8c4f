"""The training engine: batches, one step after the other, EMA, checkpoints, run directories."""
