"""Tools for the developers of this repository, run by make."""
