"""`data clean`: duplicates and text of low quality are left out."""
