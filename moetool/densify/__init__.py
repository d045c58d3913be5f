"""A dense model of a Mixture of Experts: its experts side by side in one FFN."""
