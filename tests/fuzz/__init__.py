"""Damaged inputs by the thousand: what reads them may refuse them with a reason, and nothing else."""
