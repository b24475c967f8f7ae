"""What runs in the peers' environments: the standard library, numpy, and the peer's own packages."""
