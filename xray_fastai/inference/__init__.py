"""Turns an export and a stream of images into predictions, heat maps and ONNX files."""
