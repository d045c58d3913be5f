"""The weighted mean of checkpoints of one model."""
