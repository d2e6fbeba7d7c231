"""One step as a timeline: traces, pictures, and collectives over a modelled link."""
