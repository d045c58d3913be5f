"""Hostile input: how it is made (mutate), what reads it (targets), a coverage-guided search (python -m tests.fuzz)."""
