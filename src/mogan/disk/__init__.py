"""Files on a disk: written whole or not at all, one process at a time in a folder, many at one folder's work."""
