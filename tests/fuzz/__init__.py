"""Thousands of damaged inputs: a reader may refuse them with a reason and must not fail in any other way."""
