"""Reading of image files as images, and of folders as tables with labels, patients and splits."""
