"""Dense to Mixture of Experts: plan, write, verify."""
