"""Checks of the host: libraries, addresses, ports, files, limits. They need no torch.

But for that of keys, which the adapter reads.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import fcntl
import ipaddress
import os
import resource
import socket
import struct
import time

from torch_distro._doctor_finding import Finding, failed, ok, warning
from torch_distro._extension import extension

_SIOCGIFADDR = 0x8915  # netdevice(7)
_FEW_DESCRIPTORS = 1024  # what most systems give at least


def _library(name: str, soname: str) -> ctypes.CDLL | None:
    for candidate in (soname, ctypes.util.find_library(name)):
        try:
            if candidate:
                return ctypes.CDLL(candidate)
        except OSError:
            continue
    return None


def libraries() -> list[Finding]:
    """libzmq with CURVE, libsodium."""
    findings = []
    zmq = _library("zmq", "libzmq.so.5")
    if zmq is None:
        findings.append(failed("libzmq", "not found", "install it (Debian, Ubuntu: libzmq5)"))
    else:
        parts = [ctypes.c_int() for _ in range(3)]
        zmq.zmq_version(*(ctypes.byref(part) for part in parts))
        version = ".".join(str(part.value) for part in parts)
        if zmq.zmq_has(b"curve"):
            findings.append(ok("libzmq", f"{version}, with CURVE"))
        else:
            findings.append(
                warning(
                    "libzmq",
                    f"{version}, built without CURVE",
                    "encryption will not be available: use the distribution's libzmq5",
                )
            )
    sodium = _library("sodium", "libsodium.so.23")
    if sodium is None:
        findings.append(
            failed("libsodium", "not found", "install it (Debian, Ubuntu: libsodium23)")
        )
    else:
        sodium.sodium_version_string.restype = ctypes.c_char_p
        findings.append(ok("libsodium", sodium.sodium_version_string().decode()))
    return findings


def _interface_address(name: str) -> str | None:
    """The IPv4 address of an interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            request = struct.pack("256s", name.encode()[:15])
            reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])


def bind_address() -> str:
    """Where a rank would listen: DISTRO_BIND, else the route to MASTER_ADDR, else loopback."""
    wanted = os.environ.get("DISTRO_BIND", "")
    if wanted:
        return "127.0.0.1" if wanted == "localhost" else _interface_address(wanted) or wanted
    master = os.environ.get("MASTER_ADDR", "")
    if not master:
        return "127.0.0.1"
    kind, _, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing; asks the kernel for the route
        return str(probe.getsockname()[0])


def _bind(address: str, port: int) -> None:
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(kind, socket.SOCK_STREAM) as probe:
        probe.bind((address, port))


def _by_relay() -> bool:
    return os.environ.get("DISTRO_TOPOLOGY") == "hub"


def network() -> list[Finding]:
    """The address to listen on, and the one told to peers."""
    if _by_relay() and not os.environ.get("DISTRO_SITE"):
        return [ok("network", "listens nowhere: everything goes by the relay")]
    try:
        address = bind_address()
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return [
            failed(
                "network",
                f"DISTRO_BIND={os.environ['DISTRO_BIND']} is neither an IP address nor an "
                "interface of this host",
                "set it to one of those (`ip addr` lists them), or unset it",
            )
        ]
    except OSError as error:
        return [
            failed(
                "network",
                f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} cannot be reached: {error}",
                "correct MASTER_ADDR, or the host's name service",
            )
        ]
    findings = []
    source = "DISTRO_BIND" if os.environ.get("DISTRO_BIND") else "the route to MASTER_ADDR"
    insecure = os.environ.get("DISTRO_INSECURE") == "1"
    try:
        _bind(address, 0)
    except OSError as error:
        return [
            failed(
                "network",
                f"cannot listen on {address}: {error.strerror}",
                "set DISTRO_BIND to an address or interface of this host (`ip addr` lists them)",
            )
        ]
    if parsed.is_loopback:
        findings.append(ok("network", f"listens on {address}: ranks of this host only"))
    elif _keys_given():
        findings.append(
            ok("network", f"listens on {address} ({source}) to those whom the peers file names")
        )
    elif insecure:
        findings.append(
            warning(
                "network",
                f"listens on {address} ({source}) in plain text, as DISTRO_INSECURE=1 allows",
                "make sure that only trusted hosts reach it (private network, VPN, SSH tunnels)",
            )
        )
    else:
        findings.append(
            failed(
                "network",
                f"would listen on {address} ({source}) in plain text, which is refused",
                "keys (`torch-distro keygen`); DISTRO_INSECURE=1 if the network is trusted; "
                "nothing if all ranks are on this host and DISTRO_BIND is not set",
            )
            if os.environ.get("DISTRO_BIND")
            else warning(
                "network",
                f"ranks on several hosts would listen on {address} ({source}) in plain text, "
                "which is refused",
                "keys (`torch-distro keygen`); DISTRO_INSECURE=1 if the network is trusted; "
                "nothing if all ranks are on this host",
            )
        )
    return findings + _advertised()


def _advertised() -> list[Finding]:
    name = os.environ.get("DISTRO_ADVERTISE", "")
    if not name:
        return []
    try:
        told = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        return [
            failed(
                "network",
                f"DISTRO_ADVERTISE={name} cannot be resolved: {error.strerror}",
                "set it to an address or name under which peers reach this host",
            )
        ]
    return [ok("network", f"peers are told {name} ({told})")]


def _port_range(text: str) -> range | None:
    first, _, last = text.partition("-")
    try:
        ports = range(int(first), int(last or first) + 1)
    except ValueError:
        return None
    return ports if ports and ports[0] > 0 and ports[-1] < 65536 else None


def ports() -> list[Finding]:
    """Whether the ports of DISTRO_PORTS suffice for the ranks of this host."""
    text = os.environ.get("DISTRO_PORTS", "")
    if not text:
        return [ok("ports", "any free port")]
    wanted = _port_range(text)
    if wanted is None:
        return [failed("ports", f"DISTRO_PORTS={text} is no range", "such as 40000-40100")]
    try:
        address = bind_address()
    except OSError:
        address = "127.0.0.1"
    taken = []
    for port in wanted:
        try:
            _bind(address, port)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                return []  # the address itself is wrong: the network check says so
            taken.append(port)
    free = len(wanted) - len(taken)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = f"{free} of the {len(wanted)} ports of {text} can be used on {address}"
    if free < ranks:
        return [failed("ports", f"{found}, for {ranks} ranks on this host", "widen DISTRO_PORTS")]
    return [ok("ports", found)]


def _keys_given() -> bool:
    return bool(
        os.environ.get("DISTRO_CURVE_SECRET_FILE") and os.environ.get("DISTRO_CURVE_PEERS_FILE")
    )


def keys() -> list[Finding]:
    """Files of keys: their permissions, and whether they belong together."""
    secret = os.environ.get("DISTRO_CURVE_SECRET_FILE", "")
    peers = os.environ.get("DISTRO_CURVE_PEERS_FILE", "")
    if not secret and not peers:
        return [ok("keys", "none set: traffic is in plain text, and stays on loopback by default")]
    if not secret or not peers:
        missing = "DISTRO_CURVE_PEERS_FILE" if secret else "DISTRO_CURVE_SECRET_FILE"
        return [failed("keys", f"{missing} is not set", "both files are needed")]
    try:
        owner, ranks = extension().check_keys(secret, peers)
    except ImportError:
        return [warning("keys", "not checked: the adapter cannot be loaded", "see its own finding")]
    except ValueError as error:
        return [failed("keys", str(error), "as it says; `torch-distro keygen` makes both files")]
    if not owner:
        return [
            failed(
                "keys",
                f"no line of {peers} has the public key of {secret}",
                "use the key of this rank, or give all ranks a file with its public key",
            )
        ]
    rank = os.environ.get("RANK", "")
    if rank and owner != f"rank {rank}":
        return [
            failed(
                "keys",
                f"{secret} is the key of {owner}, and this is rank {rank}",
                "set DISTRO_CURVE_SECRET_FILE to this rank's own",
            )
        ]
    return [ok("keys", f"{secret} is the key of {owner}; {peers} has {ranks} ranks")]


# Longer: a relay that is not there is noticed late; shorter: a far one is taken for none.
_RELAY_SECONDS = 5.0


def relay() -> list[Finding]:
    """Whether something listens at DISTRO_RELAY; nothing is said without a hub."""
    endpoint = os.environ.get("DISTRO_RELAY", "")
    if not _by_relay() or not endpoint.startswith("tcp://"):
        return []  # what the variables say is another check's affair
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        begin = time.monotonic()
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_RELAY_SECONDS):
            milliseconds = 1e3 * (time.monotonic() - begin)
    except (OSError, ValueError) as error:
        return [
            failed(
                "relay",
                f"{endpoint} cannot be reached: {error}",
                "see whether `torch-distro relay` runs there, and lets connections in (--bind, the "
                "server's firewall)",
            )
        ]
    return [ok("relay", f"something listens at {endpoint}, {milliseconds:.0f} ms away")]


def file_descriptors() -> list[Finding]:
    """The limit of open files: each peer takes some in each group."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    needed = max(_FEW_DESCRIPTORS, 256 + 16 * ranks)
    found = f"{soft} (hard limit {'none' if hard == resource.RLIM_INFINITY else hard})"
    if soft != resource.RLIM_INFINITY and soft < needed:
        return [
            warning(
                "file descriptors",
                f"{found}: may be too few for {ranks} ranks" if ranks > 1 else f"{found} is few",
                f"ulimit -n {needed}",
            )
        ]
    return [ok("file descriptors", found)]
