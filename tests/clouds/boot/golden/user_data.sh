#!/bin/sh
# Starts Heliostat's agent on this machine.
set -eu
dir="${HELIOSTAT_NODE_DIR:-/var/lib/heliostat}"
mkdir -p "$dir"
cd "$dir"
(umask 077; cat > heliostat-boot.json) <<'HELIOSTAT_BOOT'
{"api_url": "http://127.0.0.1:8700", "bootstrap_token": "5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e", "bundle_sha256": "abababababababababababababababababababababababababababababababab", "generation": 3, "node_id": "node_1"}
HELIOSTAT_BOOT
cat > heliostat-boot.py <<'HELIOSTAT_STUB'
# Fetches the agent, checks it, finds or makes the Python that it runs in, and becomes it.
import fcntl, hashlib, http.client, io, json, os, random, re, shutil, ssl, subprocess, sys, time, zipfile
import importlib.util, urllib.request

GIVE_UP_S = 1800  # a machine whose control plane never answers must end, not cost money for ever
NEEDS = (3, 11)  # the agent's Python
VOLUME_S = 240  # below the node's own deadline, so that its console says what it misses

here = os.getcwd()
boot_file = os.path.join(here, "heliostat-boot.json")
with open(boot_file) as f:
    boot = json.load(f)
environment = boot.get("environment")  # of a cloud's machine; on the local cloud this interpreter has Ray
give_up = time.monotonic() + GIVE_UP_S


def say(text):
    print("heliostat: " + text, file=sys.stderr, flush=True)
    if environment:  # shipped by the agent as node/startup.log
        with open("startup.log", "a") as log:
            log.write(time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime()) + text + "\n")


def fail(text):
    say(text)
    sys.exit(75)  # the script keeps the machine for a while, so that its console can be read


def tries(do):
    "Until it gives something; errors of the network pass."
    delay = 0.2
    while True:
        try:
            return do()
        except (OSError, ValueError, http.client.HTTPException) as e:
            say(str(e))
        if time.monotonic() > give_up:
            fail("giving up after %d s" % GIVE_UP_S)
        time.sleep(delay * random.uniform(0.5, 1.0))
        delay = min(delay * 2, 15)


def fetched(sha256):
    "Bytes are known by their hash, so it does not matter who serves them: this is how the API's CA itself comes."
    url = boot["api_url"].rstrip("/") + "/agent/v1/bundle/" + sha256
    try:
        with urllib.request.urlopen(url, timeout=30, context=ssl._create_unverified_context()) as answer:
            data = answer.read()
    except OSError as e:
        raise OSError("nothing from %s yet: %s" % (url, e))
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError("sha256 of what %s answers is %s" % (url, found))
    return data


def run(*argv, **more):
    "Its exit code; what it prints is logged."
    given = more.get("input")
    say("$ " + " ".join(argv))
    try:
        stdin = subprocess.DEVNULL if given is None else subprocess.PIPE
        p = subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as e:
        say(str(e))
        return 127
    if given is not None:
        p.stdin.write(given)
        p.stdin.close()
    for line in p.stdout:
        say("  " + line.decode(errors="replace").rstrip())
    return p.wait()


def must(*argv):
    "Tried again, for most of what fails here is a network's."

    def once():
        if run(*argv) != 0:
            raise OSError("failed: " + " ".join(argv))

    tries(once)


def install(dnf, apt):
    "The system's packages, by the manager that is there."
    if shutil.which("dnf"):
        must("dnf", "install", "-y", "-q", *dnf)
    elif shutil.which("apt-get"):
        os.environ["DEBIAN_FRONTEND"] = "noninteractive"
        must("apt-get", "update", "-q")
        must("apt-get", "install", "-y", "-q", *apt)
    else:
        fail("this machine misses %s and has neither dnf nor apt-get: use an image that has it" % " ".join(dnf))


def unpack():
    target = os.path.join(here, "agent-" + boot["bundle_sha256"][:12])
    with open("heliostat-boot.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a start-up script may run twice at once; only one unpacks
        if boot.get("ca_sha256"):
            data = tries(lambda: fetched(boot["ca_sha256"]))
            with open("heliostat-ca.pem.part", "wb") as f:
                f.write(data)
            os.rename("heliostat-ca.pem.part", "heliostat-ca.pem")
        if not os.path.isdir(target):
            data = tries(lambda: fetched(boot["bundle_sha256"]))
            part = target + ".part"
            shutil.rmtree(part, ignore_errors=True)  # of a start that was cut off
            with zipfile.ZipFile(io.BytesIO(data)) as z:
                z.extractall(part)
            os.rename(part, target)
    return target


def mount(volume):
    "The disk that outlives this machine: awaited, given a file system if it has none at all, and mounted."
    path, devices = volume["path"], volume["devices"].split()
    last = time.monotonic() + VOLUME_S
    with open("heliostat-volume.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.ismount(path):
            return
        while True:
            device = next((d for d in devices if os.path.exists(d)), None)
            if device:
                break
            if time.monotonic() > last:
                fail("the retained volume did not appear in %d s, at any of: %s" % (VOLUME_S, " ".join(devices)))
            time.sleep(0.5)
        try:
            with open(device, "rb") as f:
                f.read(2**20)
        except OSError as e:  # to blkid this is no file system
            fail("the retained volume %s can't be read: %s" % (device, e))
        code = run("blkid", "-p", device)
        if code == 2:  # nothing is on it; any other word than that and 0 must not cost its data
            code = run("mkfs.ext4", "-q", device)
        os.makedirs(path, exist_ok=True)
        if code or run("mount", device, path):
            fail("the retained volume %s can't be mounted at %s: see the lines above" % (device, path))


def suits(python, ray):
    if python == sys.executable:  # no process more, on the way to every node
        return sys.version_info >= NEEDS and (not ray or importlib.util.find_spec("ray") is not None)
    code = "import sys, importlib.util as u; sys.exit(sys.version_info < %r or %d and not u.find_spec('ray'))"
    try:
        return subprocess.call([python, "-c", code % (NEEDS, ray)], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def python_with_ray():
    named = environment["python"]
    if named:
        if not suits(named, 1):
            fail("%s, which the cloud's config names, is no Python %d.%d or later with Ray" % (named, *NEEDS))
        return named
    if suits(sys.executable, 1):
        return sys.executable
    made = os.path.join(here, "venv", "bin", "python")
    wanted = "ray[default,serve]==" + environment["ray_version"]
    say("no Ray here: making a Python with " + wanted)
    names = ["python3.11", "python3.12", "python3.13", "python3"]
    base = next((p for p in map(shutil.which, names) if p and suits(p, 0)), None)
    uv = shutil.which("uv")
    if uv:
        must(uv, "venv", "--allow-existing", "--python", base or "3.11", "venv")
        must(uv, "pip", "install", "--python", made, wanted)
        return made
    if not base:
        install(["python3.11"], ["python3.11", "python3.11-venv"])
        base = "python3.11"
    if run(base, "-m", "venv", "venv") != 0:  # Debian and Ubuntu keep ensurepip apart
        install(["python3-pip"], [os.path.basename(os.path.realpath(base)) + "-venv"])
        must(base, "-m", "venv", "--clear", "venv")
    must(made, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", wanted)
    return made


def login(image):
    "By the machine's own role, where the registry is the cloud's."
    host = image.split("/")[0]
    ecr = re.fullmatch(r"[0-9]+[.]dkr[.]ecr[.]([a-z0-9-]+)[.]amazonaws[.]com([.]cn)?", host)
    if ecr:
        if not shutil.which("aws"):
            install(["awscli"], ["awscli"])
        ask = ["aws", "ecr", "get-login-password", "--region", ecr.group(1)]
        user, secret = "AWS", subprocess.run(ask, stdout=subprocess.PIPE).stdout.strip()
    elif host == "gcr.io" or host.endswith((".gcr.io", "-docker.pkg.dev")):
        url = "http://169.254.169.254/computeMetadata/v1/instance/service-accounts/default/token"
        asked = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(asked, timeout=10) as answer:
            user, secret = "oauth2accesstoken", json.load(answer)["access_token"].encode()
    else:
        return
    if run("docker", "login", "--username", user, "--password-stdin", host, input=secret) != 0:
        raise OSError("no login at %s: has the machine's role the right to pull?" % host)


def container(image, target):
    "The command that becomes the agent in that image: its first process, on the host's network, with its GPUs."
    if not shutil.which("docker"):
        install(["docker"], ["docker.io"])
    if shutil.which("systemctl"):
        run("systemctl", "start", "docker")
    tries(lambda: login(image))
    must("docker", "pull", "-q", image)
    with open("/proc/meminfo") as f:
        third = int(re.search(r"MemTotal: +([0-9]+)", f.read()).group(1)) // 3  # KiB; Ray's object store is 30 %
    argv = ["docker", "run", "--rm", "--network", "host", "--user", "0:0", "--shm-size", "%dk" % third]
    argv += ["--ulimit", "nofile=65536:65536", "--volume", here + ":" + here, "--workdir", target]
    if shutil.which("nvidia-smi") and run("nvidia-smi", "-L") == 0:
        argv += ["--gpus", "all"]
    if boot.get("volume"):
        argv += ["--volume", boot["volume"]["path"] + ":" + boot["volume"]["path"]]
    for name in ("PIP_INDEX_URL", "UV_INDEX_URL"):
        argv += ["--env", name] if name in os.environ else []
    return argv + ["--entrypoint", environment["python"] or "python3", image, "-m", "agent", boot_file]


def main():
    argv = [sys.executable, "-m", "agent", boot_file]
    if boot.get("volume"):
        mount(boot["volume"])
    target = unpack()
    if environment:
        if environment["pip_index_url"]:
            os.environ["PIP_INDEX_URL"] = os.environ["UV_INDEX_URL"] = environment["pip_index_url"]
        if environment["container_image"]:
            argv = container(environment["container_image"], target)
        else:
            argv[0] = python_with_ray()
        say("starting " + " ".join(argv))
    os.chdir(target)
    os.execvp(argv[0], argv)


main()
HELIOSTAT_STUB
python="${HELIOSTAT_PYTHON:-python3}"
# On the local cloud the machine is this process; elsewhere a machine without its agent is only cost.
if [ -n "${HELIOSTAT_NODE_DIR:-}" ]; then
    exec "$python" heliostat-boot.py
fi
code=0
"$python" heliostat-boot.py || code=$?
echo "heliostat: the agent ended with exit code $code" >&2
# It never began (75: the lines above; 125 to 127: docker's and the shell's own words). The control plane reads the
# console when the node's deadline passes, and ends the machine then; a machine that is gone has no console.
case $code in 75|125|126|127) sleep 900 ;; esac
shutdown -h now
