"""RefSeg's rooms; see docs/architecture.md for who may import whom.

This file must exist: MONAI Label creates an empty `apps/refseg/lib` beside the app, and only a
regular package wins over it on the import path.
"""
