"""Routing: counts, metrics, reports."""
