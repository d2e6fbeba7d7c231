"""One step seen as a timeline: traces, a modelled link, pictures."""
