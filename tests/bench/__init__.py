"""The bench: what the daemon costs, beside a baseline and what cannot be avoided."""
