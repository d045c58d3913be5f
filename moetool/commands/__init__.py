"""One file a command: options, one call into the domain, what is printed. No maths, no torch at import."""
