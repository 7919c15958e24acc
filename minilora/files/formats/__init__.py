"""The formats that adapters come in: each in a file of its own, all read into `manifest.Contents`."""
