"""Serves a page and an API that predict uploaded images."""
