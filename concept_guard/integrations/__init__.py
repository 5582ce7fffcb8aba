"""Adapters for training loops that people already have; each is imported where it is used."""
