"""Make a Mixture of Experts of a dense language model, train it on, see its router, prove it."""

__version__ = "0.1.0"
