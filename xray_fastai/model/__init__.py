"""Builds the network and its input: backbone, head, loss, pretrained weights, transforms, loaders."""
