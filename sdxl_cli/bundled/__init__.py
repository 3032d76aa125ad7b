"""The tiny model that comes with the program, as files."""
