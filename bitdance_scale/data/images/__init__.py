"""Image files: what their bytes say, whether they are sound, and their pixels in sRGB.

limits.py          how much work a file may be, and the errors of files that are not decoded
header.py          the first bytes              -> format, sides, EXIF orientation
jpeg.py            a JPEG file                  -> whether it is complete, its samples
png.py             a PNG file                   -> whether it is complete, its samples
webp.py            a WebP file                  -> whether it is complete, its pixels
colour.py          samples and their profile    -> sRGB
flatten.py         PNG and WebP samples         -> opaque pixels in sRGB
views.py           a view, sides                -> where a crop lies
resize.py          pixels                       -> the view of the picture at the size of its bucket
"""
