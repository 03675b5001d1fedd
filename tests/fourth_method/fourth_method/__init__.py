"""A method in a package of its own: a network, a loss beside its own, and a stage that whitens its features."""
