"""Checkpoints in: directories, Hugging Face repositories and single files, read strictly."""
