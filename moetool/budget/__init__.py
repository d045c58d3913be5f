"""What upcycling would cost and give, before any of it is done: computed from headers, configuration and papers."""
