"""Files on disk to parameters: readers, key tables, formats, loading."""
