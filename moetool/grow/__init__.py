"""A Mixture of Experts with more experts, as copies of existing ones."""
