"""The report of one run or of several side by side: an HTML page and its pictures."""
