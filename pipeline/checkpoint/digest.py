"""Digests of the training state for the run's chain.

Equal states have equal digests on every engine, ZeRO stage and device: a tensor counts by its bytes in
logical order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from pipeline.checkpoint.verify import combined, join_ranks
from pipeline.distributed import session
from pipeline.sparse.sparsifier import Sparsifier

# as safetensors files name them
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MANY_BYTES = 16 << 20  # from here on several threads hash


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 (hex) that `verify.digest_of_file` finds in a safetensors file of these tensors."""
    digests = zip(tensors.items(), _each(tensors), strict=True)
    return combined({name: (_TYPES[tensor.dtype], list(tensor.shape), digest) for (name, tensor), digest in digests})


def digest_of_ranks(tensors: Mapping[str, Tensor]) -> str:
    """Return one digest of the tensors of all ranks, in the order of the ranks; every rank calls this."""
    of_ranks = session.gather_bytes(bytes.fromhex(digest_of_tensors(tensors)))
    return join_ranks(digest.hex() for digest in of_ranks)


def network_digest(model: nn.Module, sparsifier: Sparsifier) -> str:
    """Return the digest of weights, masks and the BatchNorm statistics of all ranks; every rank calls this.

    The optimiser's state is left out, for at ZeRO stage 1 it would have to travel; it decides the
    weights of the next steps, and the digest of a checkpoint has it. Each rank hashes its share of
    the weights, which are the same on all ranks.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names, num_ranks = list(weights), session.world_size()
    own = {name: weights[name] for name in names[session.rank() :: num_ranks]}
    content = bytes.fromhex(digest_of_tensors(dict(model.named_buffers()))) + b"".join(_each(own))
    of_ranks = session.gather_bytes(content.ljust(32 * (2 + len(names) // num_ranks), b"\0"))
    sha = hashlib.sha256()
    for index, name in enumerate(names):
        start = 32 * (1 + index // num_ranks)
        sha.update(f"{name} {of_ranks[index % num_ranks][start : start + 32].hex()}\n".encode())
    numbers = sparsifier.numbers()
    sha.update(f"masks {numbers['mask_digest']}\nhistory {numbers['history_digest']}\n".encode())
    for rank, of_rank in enumerate(of_ranks):
        sha.update(f"rank {rank} {of_rank[:32].hex()}\n".encode())
    return sha.hexdigest()


def _each(tensors: Mapping[str, Tensor]) -> list[bytes]:
    """Return the sha256 of each tensor's bytes in logical order."""
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    num_threads = torch.get_num_threads()
    if num_bytes < MANY_BYTES or num_threads == 1:
        return [_one(tensor) for tensor in tensors.values()]
    with ThreadPoolExecutor(num_threads) as pool:  # hashlib leaves Python's lock to others
        return list(pool.map(_one, tensors.values()))


def _one(tensor: Tensor) -> bytes:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().data).digest()
