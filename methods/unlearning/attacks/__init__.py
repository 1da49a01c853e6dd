"""Attacks on deleted facts: each makes a set of at most B answers out of an edited model."""
