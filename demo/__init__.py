"""The demo: a played annotator who labels a few images while RefSeg segments the others."""
