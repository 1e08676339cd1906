"""What a loader gives: batches, one loader of several, loops over them, image files."""
