"""Other ways to spend fewer vision tokens, implemented from their papers."""
