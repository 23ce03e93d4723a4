"""The data of the demo: scenes that a program draws and describes, as shards."""
