"What deploy/README.md has to be typed, without a daemon, a registry or a cluster: the image by buildah, on a base that debootstrap makes; what kubectl makes of the manifests. Nightly: pytest -m bench tests/test_image.py"
import os, re, shutil, signal, subprocess, time, urllib.request
from pathlib import Path

import pytest

from shop import ROOT
from test_spark import free_port

LACKS = [t for t in ("buildah", "debootstrap") if not shutil.which(t)]
pytestmark = [pytest.mark.bench, pytest.mark.timeout(3600)]
ENV = os.environ | dict(STORAGE_DRIVER="vfs", BUILDAH_ISOLATION="chroot")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

def sh(*command, **more) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENV, timeout=1800, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.strip()

def pip_conf(into: Path) -> tuple[Path, list[str]]:
    "This machine's way to packages, as the secret of the build, and the folders that it names."
    found = dict(line.split("=", 1) for line in sh("python3", "-m", "pip", "config", "list").splitlines() if line.startswith(("global.", ":env:.")))
    keep = {k.rpartition(".")[2]: v.strip("'\"") for k, v in found.items() if k.endswith(("-url", "-links", "-host", "cert"))}
    into.write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in keep.items()))
    folders = {f"/{Path(p).parts[1]}" for v in keep.values() for p in re.findall(r"(?:file://)?(/[\w./-]+)", v) if Path(p).is_dir()}
    return into, [f"{p}:{p}:ro" for p in sorted(folders)]

@pytest.fixture(scope="module")
def image(tmp_path_factory):
    "A container of the image, and what is removed afterwards."
    home = tmp_path_factory.mktemp("image")
    sh("debootstrap", "--variant=minbase", "--include=python3,python3-venv,python-is-python3,ca-certificates", "bookworm", home/"base", "http://deb.debian.org/debian")
    shutil.copy(CERTIFICATES, home/"base"/CERTIFICATES.relative_to("/"))
    base, made = sh("buildah", "from", "scratch"), []
    try:
        sh("buildah", "copy", "-q", base, home/"base", "/"); sh("buildah", "commit", "-q", base, "docker.io/library/python:3.11-slim")
        conf, folders = pip_conf(home/"pip.conf")
        sh("git", "clone", "-q", ROOT, home/"src")
        sh("buildah", "bud", "--pull=never", "--network", "host", *(x for f in folders for x in ("-v", f)), "--secret", f"id=pip,src={conf}", "-f", "deploy/Containerfile", "-t", "recsys:test", ".", cwd=home/"src")
        made.append(sh("buildah", "from", "--pull-never", "localhost/recsys:test"))
        yield made[0], home
    finally:
        for c in (base, *made): subprocess.run(["buildah", "rm", c], env=ENV, capture_output=True)
        subprocess.run(["buildah", "rmi", "localhost/recsys:test", "docker.io/library/python:3.11-slim"], env=ENV, capture_output=True)

@pytest.mark.skipif(bool(LACKS) or os.getuid() != 0, reason=f"{' and '.join(LACKS) or 'root'} is missing: apt-get install buildah debootstrap, and be root")
def test_a_day_and_the_service_in_a_container(image):
    "As the user of the image, who can write nothing but the volumes."
    container, home = image
    (home/"data").mkdir(); os.chown(home/"data", 10001, 10001); os.chmod(home, 0o755)
    inside = ("buildah", "run", "--network", "host", "-v", f"{home}/data:/data")
    assert "uid=10001" in sh(*inside, container, "id")
    port = str(free_port())
    script = "cd /data && recsys run --dataset simulated --small"
    assert "serves from now on" in sh(*inside, container, "sh", "-c", script)
    p = subprocess.Popen([*inside, "-e", f"RECSYS_SERVING_PORT={port}", container, "recsys", "serve"], env=ENV, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 600
        while True:
            assert p.poll() is None and time.monotonic() < end
            try: said = urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).read(); break
            except OSError: time.sleep(1)
        assert b"ready" in said
    finally: os.killpg(p.pid, signal.SIGTERM); p.wait(60)

@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is missing: apt-get install kubernetes-client")
def test_the_commands_for_a_cluster(tmp_path):
    "As far as they go without one: secrets are made but not sent, manifests are put together but not applied."
    for name in ("read.toml", "write.toml"): (tmp_path/name).write_text("")
    text = (ROOT/"deploy/README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^kubectl .*$", "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)), re.M)
    kinds = {line: re.findall(r"^kind: (\w+)$", sh("sh", "-c", line.replace("apply -k deploy", f"kustomize {ROOT}/deploy") if "apply -k" in line else f"{line} --dry-run=client -o yaml", cwd=tmp_path), re.M) for line in lines}
    assert len(kinds) == 3 and all(k == ["Secret"] for line, k in kinds.items() if "secret" in line)
    assert {"Deployment", "CronJob", "Service", "ConfigMap", "HorizontalPodAutoscaler", "PersistentVolumeClaim"} <= {k for line, found in kinds.items() if "apply" in line for k in found}
