"""The configuration tree: its schema, how it is loaded, and the rules it must keep."""
