"""Rewriting checkpoints: a plan of fills, one loop that writes it, and its verification."""
