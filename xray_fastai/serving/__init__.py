"""A page and an API that predict uploaded images."""
