"""Networks: what a caller must know of one (spec), how it is built, and its weights."""
