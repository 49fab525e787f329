"""Accuracy against tokens: arrcoc and its rivals on one checkpoint, one data set and equal vision tokens."""
