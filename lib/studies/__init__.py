"""The datastore as RefSeg sees it: a folder or a PACS, its labels, and every version of them."""
