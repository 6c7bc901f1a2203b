"""A variational autoencoder trained on real images with fastvae: what ``fastvae demo`` runs.

The ``demo`` extra is needed by `pictures`, and by `data` for the digits and for folders of images.
"""
