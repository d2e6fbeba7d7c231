"""The input cut into parts, and the processes that work through them."""
