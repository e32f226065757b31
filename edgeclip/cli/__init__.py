"""Command line of edgeclip."""
