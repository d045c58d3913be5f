"""Continual pretraining."""
