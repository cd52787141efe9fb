"""Where images come from: the public collection, and X-rays that the package draws."""
