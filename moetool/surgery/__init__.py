"""Checkpoints rewritten as checkpoints: a plan of fills, one loop that writes it, and its proof."""
