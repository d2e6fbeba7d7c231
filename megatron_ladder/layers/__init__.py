"""The ladder layer and its parts in plain torch: linears, norms, attention, recompute."""
