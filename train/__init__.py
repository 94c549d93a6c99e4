"""The trainer: `python -m train.main --arch=vgg16`."""
