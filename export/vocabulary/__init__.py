"""Pruned vocabularies: the tokens that texts in some languages need, and a tower with only these."""
