"""The stand-in's own tests: what it is trusted with, it is held to."""
