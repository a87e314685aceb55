"""How far masks are to be trusted: learned on the user's labels, told for all other images."""
