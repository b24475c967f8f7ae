"""Zero-shot classification with an exported model beside PyTorch: sets, evaluation, report, table."""
