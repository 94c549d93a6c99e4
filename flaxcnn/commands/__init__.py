"""The commands of `python -m flaxcnn`: one file each, files or names in, answers out."""
