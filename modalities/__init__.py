"""From raw documents to a pretrained language model. Each module says in its first lines what it is for."""

__version__ = "0.1.0"
