"""Trains the small reader on placards: on mixed allocations, in all layouts, resumable."""
