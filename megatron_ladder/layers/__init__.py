"""The ladder layer and its parts in plain torch: linears, norm, attention, recomputation."""
