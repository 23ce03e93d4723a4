"""Image files: what their bytes say, whether they are sound, and their pixels in sRGB.

header.py          the first bytes              -> format, sides, EXIF orientation
"""
