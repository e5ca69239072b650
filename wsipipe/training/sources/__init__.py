"""Data sets as others lay them out, turned into patch sets (`wsipipe.training.data`): one module a layout."""
