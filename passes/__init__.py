"""The passes of fxzip, one file each, named by what they do, in the order in which they run."""
