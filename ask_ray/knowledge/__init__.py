"""The knowledge base and its life: encoding, indexing, publishing, swapping."""

import torch  # noqa: F401 (before FAISS: both bring libcurand, and the one that PyTorch was built with must be first)
