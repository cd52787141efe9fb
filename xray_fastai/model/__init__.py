"""The network and what goes into it: backbone, head, loss, pretrained weights, transforms, loaders."""
