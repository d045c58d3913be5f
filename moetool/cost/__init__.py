"""The cost of a model and of a run (parameters, operations, memory), known before any weights are read."""
