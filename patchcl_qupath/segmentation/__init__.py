"""One tile: from pixels to instances, contours, measurements."""
