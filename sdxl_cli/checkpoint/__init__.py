"""Files to state dicts and back."""
