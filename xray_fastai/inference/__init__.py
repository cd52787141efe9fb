"""An export and a stream of images become predictions, heat maps and ONNX files."""
