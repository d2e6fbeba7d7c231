"""A data set's folder: making it from tokenized parts, checking, showing and blending it."""
