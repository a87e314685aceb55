"""Nearest neighbours, selection and coverage over plain vectors and integer ids."""
