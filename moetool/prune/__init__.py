"""A Mixture of Experts without the experts that contribute least on a text."""
