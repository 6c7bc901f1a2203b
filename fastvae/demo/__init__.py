"""A variational autoencoder trained on real images with fastvae: what ``fastvae demo`` runs.

`data` loads images, `model` is the network, `objectives` holds the same objective twice (with
fastvae's ops, in plain PyTorch), `train` trains, evaluates, compares and times, `pictures` draws.
The ``demo`` extra is needed by `pictures`, and by `data` for the digits and for folders of images.
"""
