"""Other ways to run the same models, side by side in one run; see docs/adding/peer.md."""
