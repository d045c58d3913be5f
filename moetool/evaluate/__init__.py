"""lm-evaluation-harness underneath."""
