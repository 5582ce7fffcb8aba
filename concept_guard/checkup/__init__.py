"""Checkup: the doctor for what the command line names: a model, a recipe, or a train.py of timm."""

from concept_guard.checkup.running import checkup

__all__ = ["checkup"]
