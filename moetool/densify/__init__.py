"""A Mixture of Experts as a dense model: its experts side by side in one FFN."""
