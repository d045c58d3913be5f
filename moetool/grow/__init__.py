"""A Mixture of Experts with more experts, copies of those that it has."""
