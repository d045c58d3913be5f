"""The cost and gain of upcycling, estimated from headers, configuration and papers."""
