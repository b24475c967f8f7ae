"""Code for the peers' environments: it imports the standard library, numpy and the peer's packages."""
