"""Models, bundles and written-out references."""
