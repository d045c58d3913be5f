"""Convert a dense language model to a Mixture of Experts, train it, analyse its routing, verify the result."""

__version__ = "0.2.0"
