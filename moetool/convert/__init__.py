"""A checkpoint as the same model in another form: dtype, files, layout of experts, an adapter merged."""
