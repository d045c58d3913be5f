"""Faults done to the real command line: one try breaks something once, checks what must hold, says what happened."""
