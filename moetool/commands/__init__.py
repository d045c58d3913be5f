"""One file per command: options, one call into the domain, output. No maths, no torch at import."""
