"""A Mixture of Experts without the experts that do least on some text."""
