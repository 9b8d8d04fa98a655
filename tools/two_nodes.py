"""Two network namespaces with a cable between them: two machines, as far as the network goes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

DEVICE = 'wire'


@dataclass(frozen=True)
class Node:
    """One end of the cable.

    Attributes:
        name: of its network namespace.
        address: its IP address.
        rank: 0 or 1.
    """

    name: str
    address: str
    rank: int

    @property
    def inside(self) -> list[str]:
        """What comes before a command that is to run in this node."""
        return ['ip', 'netns', 'exec', self.name]

    @property
    def environment(self) -> dict[str, str]:
        """What dist_train.sh, torchrun and gloo need, but for the port."""
        return dict(
            NNODES='2',
            NODE_RANK=str(self.rank),
            MASTER_ADDR='10.77.0.1',
            GLOO_SOCKET_IFNAME=DEVICE,
            # Both nodes have the name of this machine, so torchrun is told the address of each.
            PET_LOCAL_ADDR=self.address,
        )

    def sent(self) -> int:
        """Bytes that have left this node."""
        path = f'/sys/class/net/{DEVICE}/statistics/tx_bytes'
        return int(
            subprocess.run([*self.inside, 'cat', path], check=True, capture_output=True).stdout
        )


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Make both nodes, and remove them afterwards.

    Raises:
        OSError: it needs root, iproute2 and a kernel that lets namespaces be made.
    """
    if shutil.which('ip') is None or os.geteuid() != 0:
        raise OSError(
            'network namespaces need root and iproute2 (Debian: apt-get install iproute2)'
        )
    names = [f'protune{os.getpid()}{side}' for side in 'ab']
    nodes = tuple(Node(name, f'10.77.0.{i + 1}', i) for i, name in enumerate(names))
    try:
        for node in nodes:
            _ip('netns', 'add', node.name)
        peer = ['type', 'veth', 'peer', DEVICE, 'netns', names[1]]
        _ip('link', 'add', DEVICE, 'netns', names[0], *peer)
        for node in nodes:
            _ip('-n', node.name, 'addr', 'add', f'{node.address}/24', 'dev', DEVICE)
            for device in (DEVICE, 'lo'):
                _ip('-n', node.name, 'link', 'set', device, 'up')
        yield nodes
    finally:
        for node in nodes:
            subprocess.run(['ip', 'netns', 'del', node.name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(['ip', *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f'network namespaces cannot be made here: {done.stderr.strip()}')
