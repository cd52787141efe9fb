"""Sources of images: the public collection, and X-rays that the package draws."""
