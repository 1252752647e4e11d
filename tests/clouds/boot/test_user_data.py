"""User-data on a real ``sh`` and Python, against a real HTTP server."""

from __future__ import annotations

import ast
import hashlib
import http.server
import io
import json
import os
import shutil
import ssl
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.channel import Channel, Unavailable
from clouds.boot import user_data as bootstrap
from clouds.boot.stub import STUB
from clouds.boot.user_data import NodeEnvironment
from clouds.contract.errors import BadConfig
from clouds.contract.retained import DEVICES
from clouds.local.balancer.tls import self_signed
from heliostat.models.clouds import Provider

GOLDEN = Path(__file__).parent / "golden" / "user_data.sh"
TOKEN = "5e" * 32


def _fake_agent() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("agent/__init__.py", "")
        z.writestr(
            "agent/__main__.py",
            "import json, sys\nboot = json.load(open(sys.argv[1]))\nprint('AGENT', boot['node_id'], sys.argv[1])\n"
            "sys.exit(7)\n",
        )
    return buffer.getvalue()


class Api(http.server.BaseHTTPRequestHandler):
    answers: list[tuple[int, bytes]] = []
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[str]:
    Api.answers, Api.asked = [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _boot(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    file = folder / "user-data"
    file.write_text(script)
    base = {"PATH": os.environ["PATH"], "HELIOSTAT_PYTHON": sys.executable}
    return subprocess.run(["sh", str(file)], env=base | env, capture_output=True, text=True, timeout=60, check=False)


def test_the_same_bytes_for_ever() -> None:
    """A change here changes the request of machines that are being launched during an upgrade: do it knowingly
    (HELIOSTAT_UPDATE_GOLDEN=1)."""
    script = bootstrap.user_data("http://127.0.0.1:8700", "node_1", 3, TOKEN, "ab" * 32)
    if os.environ.get("HELIOSTAT_UPDATE_GOLDEN"):
        GOLDEN.write_text(script)
    assert script == GOLDEN.read_text()
    assert len(script.encode()) < 16 * 1024


def test_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="16 KiB"):
        bootstrap.user_data("http://" + "x" * 16384, "node_1", 1, TOKEN, "ab" * 32)


def test_boots_the_agent_it_was_told(api: str, tmp_path: Path) -> None:
    data = _fake_agent()
    sha = hashlib.sha256(data).hexdigest()
    Api.answers = [(503, b"not yet"), (200, b"something else"), (200, data)]
    node_dir = tmp_path / "node"
    done = _boot(bootstrap.user_data(api + "/", "node_x", 2, TOKEN, sha), tmp_path, HELIOSTAT_NODE_DIR=str(node_dir))
    boot_file = node_dir / "heliostat-boot.json"
    assert done.stdout.split() == ["AGENT", "node_x", str(boot_file)], done.stderr
    assert done.returncode == 7, "the machine's end is the agent's end"
    assert Api.asked == [f"/agent/v1/bundle/{sha}"] * 3, "an error and wrong bytes are tried again"
    assert stat.S_IMODE(boot_file.stat().st_mode) == 0o600
    assert json.loads(boot_file.read_text()) == {
        "api_url": api + "/",
        "node_id": "node_x",
        "generation": 2,
        "bootstrap_token": TOKEN,
        "bundle_sha256": sha,
    }
    assert TOKEN not in done.stdout + done.stderr

    Api.asked.clear()
    again = _boot(bootstrap.user_data(api, "node_x", 2, TOKEN, sha), tmp_path, HELIOSTAT_NODE_DIR=str(node_dir))
    assert again.returncode == 7
    assert Api.asked == [], "a bundle that is there is not fetched again"


class Vm:
    """A cloud's machine as far as user-data sees one: the only commands are those in ``bin``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.dir = folder, folder / "bin", folder / "var"
        self.bin.mkdir()
        for name in ("mkdir", "cat", "cp", "sh"):
            (self.bin / name).symlink_to(str(shutil.which(name)))
        self.shim("shutdown", 'echo "SHUTDOWN $@"')
        self.shim("sleep", 'echo "SLEPT $@"')
        self.link("python3", sys.executable)

    def shim(self, name: str, body: str, installed: bool = True) -> Path:
        """A command that writes its arguments to ``calls`` and does ``body``."""
        file = (self.bin if installed else self.folder) / name
        file.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.folder}/calls\n{body}\n')
        file.chmod(0o755)
        return file

    def link(self, name: str, target: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        self.shim(name, f'exec {target} "$@"')

    def calls(self, command: str) -> list[str]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.split()[0] == command]

    def boot(self, api: str, **environment: str) -> subprocess.CompletedProcess[str]:
        data = _fake_agent()
        Api.answers = [(200, data)]
        into = NodeEnvironment(provider=Provider.AWS, **environment)  # type: ignore[arg-type]
        script = bootstrap.user_data(api, "node_x", 2, TOKEN, hashlib.sha256(data).hexdigest(), environment=into)
        script = script.replace("/var/lib/heliostat", str(self.dir))  # the test has no right to the real one
        return _boot(script, self.folder, PATH=str(self.bin), HELIOSTAT_PYTHON="python3")

    def log(self) -> str:
        return (self.dir / "startup.log").read_text()


@pytest.fixture
def vm(tmp_path: Path) -> Vm:
    return Vm(tmp_path)


def without_ray(vm: Vm) -> str:
    """A Python of the agent's version that has no Ray, as ``python3`` of that machine."""
    bare = str(Path(sys.executable).resolve())
    vm.link("python3", f"{bare} -I -S")
    return bare


def test_a_clouds_machine_with_ray_runs_the_agent_and_ends_with_it(api: str, vm: Vm) -> None:
    done = vm.boot(api, pip_index_url="https://pypi.example.com/simple")
    assert "AGENT node_x" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "SHUTDOWN -h now", "and at once: the agent has told why it ended"
    assert "exit code 7" in done.stderr
    assert f"starting {sys.executable}" in vm.log() or "starting /" in vm.log()
    assert TOKEN not in done.stdout + done.stderr + vm.log()


def test_in_a_container_image(api: str, vm: Vm) -> None:
    """docker is asked for the host's network and its GPUs; what it prints is in the start-up log."""
    image = "rayproject/ray:2.60.0-py311-gpu"
    agent = 'while [ "$1" != -m ]; do shift; done; exec python3 "$@"'
    vm.shim("docker", f'case $1 in pull) echo "pulled: $3" ;; run) {agent} ;; esac')
    vm.shim("nvidia-smi", "echo GPU 0")
    done = vm.boot(api, container_image=image, pip_index_url="https://pypi.example.com/simple")
    assert "AGENT node_x" in done.stdout, done.stderr
    pull, run = vm.calls("docker")
    assert pull == f"pull -q {image}"
    for wanted in (
        "run --rm --network host --user 0:0 --shm-size ",
        "--gpus all",
        f"--volume {vm.dir}:{vm.dir}",
        "--env PIP_INDEX_URL",
        f"--entrypoint python3 {image} -m agent {vm.dir}/",
    ):
        assert wanted in run
    assert f"pulled: {image}" in vm.log()
    assert TOKEN not in vm.log() + (vm.folder / "calls").read_text()


def test_docker_is_installed_where_it_is_missing_and_asked_for_no_gpus_where_there_are_none(api: str, vm: Vm) -> None:
    docker = vm.shim("docker", "", installed=False)
    vm.shim("dnf", f"cp {docker} {vm.bin}/docker")
    vm.shim("systemctl", "")
    vm.shim("nvidia-smi", "exit 9")  # there is the program, but no GPU
    vm.boot(api, container_image="busybox")
    assert vm.calls("dnf") == ["install -y -q docker"]
    assert vm.calls("systemctl") == ["start docker"]
    assert "--gpus" not in vm.calls("docker")[1]


@pytest.mark.parametrize("code", [125, 126, 127])
def test_a_machine_whose_agent_never_began_stays_for_its_console(api: str, vm: Vm, code: int) -> None:
    vm.shim("docker", f"[ $1 = pull ] || {{ echo no such runtime >&2; exit {code}; }}")
    done = vm.boot(api, container_image="rayproject/ray:2.60.0-py311")
    assert done.stdout.splitlines() == ["SLEPT 900", "SHUTDOWN -h now"]
    assert "no such runtime" in done.stderr, "on the console"


def test_the_registrys_password_comes_by_the_machines_role_and_is_nowhere_told(api: str, vm: Vm) -> None:
    vm.shim("aws", "echo s3cr3t-of-ecr")
    vm.shim("docker", f"[ $1 != login ] || cat > {vm.folder}/password")
    image = "123456789012.dkr.ecr.us-west-2.amazonaws.com/ours:1"
    done = vm.boot(api, container_image=image)
    assert vm.calls("aws") == ["ecr get-login-password --region us-west-2"]
    assert vm.calls("docker")[0] == "login --username AWS --password-stdin 123456789012.dkr.ecr.us-west-2.amazonaws.com"
    assert (vm.folder / "password").read_text() == "s3cr3t-of-ecr"
    assert "s3cr3t" not in vm.log() + done.stderr + done.stdout + (vm.folder / "calls").read_text()


def with_volume(vm: Vm, api: str, device: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    data = _fake_agent()
    Api.answers = [(200, data)]
    into = NodeEnvironment(provider=Provider.AWS, **environment)  # type: ignore[arg-type]
    script = bootstrap.user_data(
        api, "node_x", 2, TOKEN, hashlib.sha256(data).hexdigest(), environment=into, volume_path=str(vm.folder / "kept")
    )
    script = script.replace(DEVICES, f"{vm.folder}/none {device}").replace("VOLUME_S = 240", "VOLUME_S = 1")
    script = script.replace("/var/lib/heliostat", str(vm.dir))
    return _boot(script, vm.folder, PATH=str(vm.bin), HELIOSTAT_PYTHON="python3")


def real(vm: Vm, *names: str) -> None:
    """The system's own program."""
    for name in names:
        vm.shim(name, f'exec {shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")} "$@"')


@pytest.mark.skipif(not shutil.which("mkfs.ext4", path=os.environ["PATH"] + ":/usr/sbin:/sbin"), reason="no e2fsprogs")
def test_the_disk_that_a_head_keeps_is_formatted_once_and_mounted(api: str, vm: Vm) -> None:
    """The device is a file, to which the real blkid and mkfs do what they do to a disk."""
    device = vm.folder / "disk"
    device.write_bytes(b"\0" * 2**22)
    real(vm, "blkid", "mkfs.ext4")
    vm.shim("mount", "")
    vm.shim("docker", "")
    done = with_volume(vm, api, device, container_image="rayproject/ray:2.60.0-py311")
    kept = vm.folder / "kept"
    assert vm.calls("mount") == [f"{device} {kept}"], done.stderr
    assert kept.is_dir()
    assert f"--volume {kept}:{kept}" in vm.calls("docker")[-1]
    formatted = device.read_bytes()
    assert formatted != b"\0" * 2**22
    with_volume(vm, api, device)
    assert vm.calls("mkfs.ext4") == [f"-q {device}"], "the next head finds what the one before has written"
    assert device.read_bytes() == formatted


@pytest.mark.parametrize(
    ("blkid", "mount", "said"),
    [
        (0, 32, "can't be mounted"),
        (8, 0, "can't be mounted"),
        (127, 0, "can't be mounted"),
        (None, 0, "did not appear"),
    ],
)
def test_a_disk_that_can_not_be_had_ends_the_machine_and_says_why(
    api: str, vm: Vm, blkid: int | None, mount: int, said: str
) -> None:
    """What is on it is not touched."""
    device = vm.folder / "disk"
    if blkid is not None:
        device.write_bytes(b"x" * 100)
        vm.shim("blkid", f"exit {blkid}")
    vm.shim("mkfs.ext4", "")
    vm.shim("mount", f"exit {mount}")
    done = with_volume(vm, api, device)
    assert done.stdout.splitlines() == ["SLEPT 900", "SHUTDOWN -h now"]
    assert said in done.stderr
    assert said in vm.log()
    assert vm.calls("mkfs.ext4") == []
    assert Api.asked == [], "the agent was not begun"


def test_no_other_registry_is_given_what_the_machine_is(api: str, vm: Vm) -> None:
    vm.shim("aws", "echo s3cr3t-of-ecr")
    vm.shim("docker", "")
    for host in ("123456789012.dkr.ecr.us-west-2.amazonaws.com.example.com", "notgcr.io", "example.com"):
        vm.boot(api, container_image=f"{host}/ours:1")
        assert "login" not in (vm.folder / "calls").read_text()


@pytest.mark.parametrize("uv", [True, False])
def test_a_python_environment_with_the_control_planes_ray_is_made(api: str, vm: Vm, uv: bool) -> None:
    bare = without_ray(vm)
    made = vm.shim("pip", f'[ "$2" = pip ] || exec {bare} "$@"', installed=False)
    make = f"mkdir -p {vm.dir}/venv/bin && cp {made} {vm.dir}/venv/bin/python"
    vm.shim("python3.11", f'if [ "$2" = venv ]; then {make}; else exec {bare} "$@"; fi')
    if uv:
        vm.shim("uv", make)
    done = vm.boot(api, pip_index_url="https://pypi.example.com/simple")
    assert "AGENT node_x" in done.stdout, done.stderr
    wanted = f"ray[default,serve]=={bootstrap.RAY_VERSION}"
    if uv:
        assert vm.calls("uv")[1] == f"pip install --python {vm.dir}/venv/bin/python {wanted}"
    else:
        assert vm.calls("pip")[0] == f"-m pip install --disable-pip-version-check --no-input {wanted}"
    assert wanted in vm.log()


def test_a_named_python_that_has_no_ray_is_said_by_name(api: str, vm: Vm) -> None:
    bare = vm.folder / "bare"
    bare.write_text(f'#!/bin/sh\nexec {Path(sys.executable).resolve()} -I -S "$@"\n')
    bare.chmod(0o755)
    done = vm.boot(api, python=str(bare))
    assert f"{bare}, which the cloud's config names, is no Python 3.11 or later with Ray" in done.stderr
    assert done.stdout.splitlines() == ["SLEPT 900", "SHUTDOWN -h now"]


def test_without_a_package_manager_it_says_what_is_missing(api: str, vm: Vm) -> None:
    done = vm.boot(api, container_image="busybox")
    assert "this machine misses docker and has neither dnf nor apt-get" in done.stderr
    assert done.stdout.splitlines() == ["SLEPT 900", "SHUTDOWN -h now"]


def test_the_stub_is_python_3_9_and_the_agent_says_what_it_needs(tmp_path: Path) -> None:
    """What the images of Amazon Linux 2023 and Debian 12 have; the agent itself wants more."""
    ast.parse(STUB, feature_version=(3, 9))
    main = (bootstrap.AGENT_FOLDER / "__main__.py").read_text()
    ast.parse(main, feature_version=(3, 8))
    old = main.replace("sys.version_info < (3, 11)", "sys.version_info < (9, 11)")
    (tmp_path / "old.py").write_text(old)
    done = subprocess.run([sys.executable, str(tmp_path / "old.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert "the agent needs Python 3.11 or later" in done.stderr


def test_an_api_with_a_certificate_of_its_own_is_trusted_by_hash_and_nobody_else(tmp_path: Path) -> None:
    """The CA comes by its hash over a connection that proves nothing; from then on the agent trusts it alone."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    self_signed(cert, key, ["127.0.0.1"])
    bundles = bootstrap.Bundles(tmp_path / "bundles")
    ca, data = bundles.keep_ca(cert), _fake_agent()
    sha = hashlib.sha256(data).hexdigest()
    Api.answers, Api.asked = [(200, b"an attacker's"), (200, bundles[ca]), (200, data), (200, b"{}")], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"https://127.0.0.1:{server.server_port}"
        script = bootstrap.user_data(url, "node_x", 2, TOKEN, sha, ca_sha256=ca)
        done = _boot(script, tmp_path, HELIOSTAT_NODE_DIR=str(tmp_path / "node"))
        assert "AGENT node_x" in done.stdout, done.stderr
        assert [path.rsplit("/", 1)[1] for path in Api.asked] == [ca, ca, sha]
        pem = tmp_path / "node" / "heliostat-ca.pem"
        assert pem.read_bytes() == cert.read_bytes()
        assert Channel(url, pem).call("GET", "/head") == {}
        with pytest.raises(Unavailable, match="CERTIFICATE_VERIFY_FAILED"):
            Channel(url).call("GET", "/head")
    finally:
        server.shutdown()
        server.server_close()


def test_what_is_no_certificate_is_refused_before_a_machine_needs_it(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing of the kind")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(BadConfig, match=name):
            bootstrap.Bundles(tmp_path / "bundles").keep_ca(tmp_path / name)


def test_the_ray_that_machines_must_have_is_the_one_we_are_tested_with() -> None:
    import tomllib

    pinned = tomllib.loads((bootstrap.AGENT_FOLDER.parent / "pyproject.toml").read_text())["dependency-groups"]["local"]
    assert [p.partition("==")[2] for p in pinned if p.startswith("ray[")] == [bootstrap.RAY_VERSION]


def test_bundle_is_the_agent_and_deterministic() -> None:
    sha, data = bootstrap.bundle()
    assert hashlib.sha256(data).hexdigest() == sha
    bootstrap.bundle.cache_clear()
    assert bootstrap.bundle() == (sha, data)
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        names = z.namelist()
        assert "agent/__init__.py" in names
        assert names == sorted(names)
        assert not [n for n in names if "__pycache__" in n]
        for name in names:
            assert z.read(name) == (bootstrap.AGENT_FOLDER.parent / name).read_bytes()
    folder = bootstrap.AGENT_FOLDER
    assert {n for n in names if n.endswith(".py")} == {f"agent/{p.relative_to(folder)}" for p in folder.rglob("*.py")}
    assert {"agent/gate/http.py", "agent/ray_node/process.py"} < set(names)


def test_the_agent_runs_from_its_bundle(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(bootstrap.bundle()[1])) as z:
        z.extractall(tmp_path)
    code = "import agent.head.life, agent.node.life, agent.gate_install as g; print(g.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "agent" / "gate_install.py")
    done = subprocess.run([sys.executable, "-m", "agent"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: python -m agent <boot file>\n")


def test_old_bundles_stay(tmp_path: Path) -> None:
    store = tmp_path / "bundles"
    old = "0" * 64
    store.mkdir()
    (store / f"{old}.zip").write_bytes(b"old release")
    bundles = bootstrap.Bundles(store)
    sha = bundles.keep()
    assert bundles.keep() == sha
    assert bundles[sha] == bootstrap.bundle()[1]
    assert bundles[old] == b"old release"
    assert set(bundles) == {sha, old}
    assert "1" * 64 not in bundles
    assert "../bundles/" + old not in bundles
    assert len(list(store.iterdir())) == len(bundles) == 2, "no temporary file stays"
