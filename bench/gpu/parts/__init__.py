"""Parts of a bundle that are made small: models that share weights, and a library for one GPU."""
