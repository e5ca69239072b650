"""The stages: one function each, which reads, calls the pure part and writes; one command and one rule by its name."""
