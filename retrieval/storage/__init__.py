"""What lies on the disk: files that never change, one database, one writer, and merging."""
