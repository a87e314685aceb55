"""Reading, orienting, cutting and writing images. Knows files and arrays, nothing of models."""
