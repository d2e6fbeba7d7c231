"""The index files of a run: which documents each sequence holds, and the order of a blend."""
