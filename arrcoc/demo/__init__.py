"""The demo: an untrained checkpoint made on the spot, and bundled photographs with questions."""
