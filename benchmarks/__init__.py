"""Programs that measure bstf and its compiler; each prints a table and writes its numbers."""
