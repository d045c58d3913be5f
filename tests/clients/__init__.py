"""Where checkpoints run: small models of every pair and trait, in the real engines. `python -m tests.clients`."""
