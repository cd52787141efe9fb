"""A run's folder on disk: its schema, safe reading, verification, and the folder while a fit is under way."""
