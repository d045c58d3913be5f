"""What runs of `moetool cpt` are doing, read from their folders: one JSON document, and a page drawn from it."""
