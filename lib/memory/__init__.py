"""The memory bank: what is kept of labelled slices, on disk and in memory."""
