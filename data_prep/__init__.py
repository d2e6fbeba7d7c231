"""From text to data sets: reading, cleaning, tokenizing, checking and blending."""
