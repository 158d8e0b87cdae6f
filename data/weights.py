"""Weights and checkpoints on disk: written aside and renamed, read without ever executing a pickle."""
import os
import pickle
import zipfile
from pathlib import Path

import torch


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values so that a kill at any moment leaves the old file or the new one, whole.

    The bytes go to `<path>.tmp`, are flushed to the disk, and only then take the final name.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load_checkpoint(path, device="cpu"):
    """Read what `save_checkpoint` wrote.   raises FileNotFoundError or ValueError, each with what to type"""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: train first, or point --ckpt at another checkpoint")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint of this project ({reason})") from error
