"""The demo: the bundled checkpoint, how it is trained, and questions about drawn signs."""
