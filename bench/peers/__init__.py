"""Other libraries running the same models, measured in one run; see docs/adding/peer.md."""
