"""RefSeg at a PACS and in OHIF, for real: `make scenes`. Needs programs that tests do without."""
