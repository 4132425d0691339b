"The manifests: they parse, they fit together, they name only what exists, and nothing in them runs as root."
import ipaddress, re
from pathlib import Path, PurePosixPath

import pytest, yaml

from recsys.core.settings import load_settings
from recsys.operations.cli import parser
from recsys.serving.keys import check_exposure
from recsys.serving.openapi import find_route

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT/"deploy"/"kubernetes"
FILES = {p.name: [d for d in yaml.safe_load_all(p.read_text(encoding="utf-8")) if d] for p in sorted(FOLDER.glob("*.yaml"))}
OBJECTS = [d for name, docs in FILES.items() if name not in ("kustomization.yaml", "sizing.yaml") for d in docs]
NAMED = {(d["kind"], d["metadata"]["name"]): d for d in OBJECTS}
SIZES = {(d["kind"], d["metadata"]["name"]): d for d in FILES["sizing.yaml"]}
IMAGE = (ROOT/"deploy"/"Containerfile").read_text(encoding="utf-8")
BAKED = dict(re.findall(r"(\w+)=(\S+)", re.search(r"^ENV ((?:.*\\\n)*.*)$", IMAGE, re.M)[1]))

def template(d): return (d["spec"]["jobTemplate"]["spec"] if d["kind"] == "CronJob" else d["spec"])["template"]
WORK = {k: template(d) for k, d in NAMED.items() if k[0] in ("Deployment", "CronJob")}
PODS = {k: t["spec"] for k, t in WORK.items()}
pods = pytest.mark.parametrize("key", PODS, ids=lambda k: k[1])

def container(key): return PODS[key]["containers"][0]
def sized(key): return template(SIZES[key])["spec"]["containers"][0]
def mounts(key): return {m["mountPath"]: m for m in container(key)["volumeMounts"]}

def environment(key) -> dict[str, str]:
    "As the process sees it: of the image, the config map, the manifest, its sizes; addresses as the README gives them."
    said = dict(BAKED) | NAMED["ConfigMap", "recsys-settings"]["data"] | {"RECSYS_SERVING_STATE": "redis://:secret@redis:6379/0"}
    return said | {e["name"]: e["value"] for c in (container(key), sized(key)) for e in c.get("env", [])}

# ---- whole and fitting

def test_every_file_is_applied_and_every_object_has_one_name():
    kustomization, = FILES["kustomization.yaml"]
    assert sorted(kustomization["resources"] + [p["path"] for p in kustomization["patches"]] + ["kustomization.yaml"]) == sorted(FILES)
    assert len(NAMED) == len(OBJECTS) and all({"apiVersion", "kind", "metadata"} <= d.keys() for d in OBJECTS)

def test_numbers_of_size_stand_in_one_place():
    assert SIZES.keys() == PODS.keys() | {("HorizontalPodAutoscaler", "recsys-lists")}
    for key in PODS:
        assert "resources" not in container(key) and sized(key)["name"] == container(key)["name"] and len(PODS[key]["containers"]) == 1
        r = sized(key)["resources"]
        assert {"cpu", "memory"} <= r["requests"].keys() and r["limits"]["memory"] == r["requests"]["memory"]
    hpa = SIZES["HorizontalPodAutoscaler", "recsys-lists"]["spec"]
    assert 2 <= hpa["minReplicas"] <= hpa["maxReplicas"] and hpa["metrics"][0]["resource"]["name"] == "cpu"
    assert NAMED["HorizontalPodAutoscaler", "recsys-lists"]["spec"]["scaleTargetRef"]["name"] == "recsys-lists" and "replicas" not in NAMED["Deployment", "recsys-lists"]["spec"]
    for key in PODS:
        if key[0] == "Deployment": assert int(environment(key)["RECSYS_SERVING_WORKERS"]) <= float(sized(key)["resources"]["requests"]["cpu"])

def test_memory_and_lists_a_second_follow_from_what_was_measured():
    text = (FOLDER/"sizing.yaml").read_text(encoding="utf-8")
    cost, worker, tables = (float(re.search(rf"^#   {n} = ([\d.]+)", text, re.M)[1]) for n in ("request_cpu_us", "rss_mb_per_worker", "tables"))
    for name in ("recsys-lists", "recsys-events"):
        workers, memory = int(environment(("Deployment", name))["RECSYS_SERVING_WORKERS"]), sized(("Deployment", name))["resources"]["requests"]["memory"]
        assert 1 <= int(memory.removesuffix("Mi")) * 1.048576 / ((tables + workers * worker) * 1.2) < 1.01
        assert f"= {workers * 1e6 / cost * .7:,.0f} lists a second" in text

def test_what_selects_finds():
    labels = {k: t["metadata"]["labels"] for k, t in WORK.items()}
    for (kind, name), d in NAMED.items():
        if kind in ("Deployment", "PodDisruptionBudget"): assert d["spec"]["selector"]["matchLabels"] == labels["Deployment", name]
        if kind == "Service":
            assert d["spec"]["selector"] == labels["Deployment", name]
            ports = {p["name"]: p["containerPort"] for p in container(("Deployment", name))["ports"]}
            assert all(p["targetPort"] in ports for p in d["spec"]["ports"])
    affinity = PODS["CronJob", "recsys-daily"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]
    assert affinity["labelSelector"]["matchLabels"] == labels["Deployment", "recsys-events"]

@pods
def test_volumes_exist(key):
    volumes = {v["name"]: v for v in PODS[key]["volumes"]}
    assert {m["name"] for m in container(key)["volumeMounts"]} == volumes.keys()
    for v in volumes.values():
        if claim := v.get("persistentVolumeClaim"): assert ("PersistentVolumeClaim", claim["claimName"]) in NAMED

def test_one_pod_beside_the_log_of_events_and_none_that_could_lose_one():
    events, lists = NAMED["Deployment", "recsys-events"]["spec"], PODS["Deployment", "recsys-lists"]
    assert events["replicas"] == 1 and events["strategy"]["type"] == "Recreate"
    assert NAMED["PersistentVolumeClaim", "recsys-events"]["spec"]["accessModes"] == ["ReadWriteOnce"]
    users = {k[1] for k, p in PODS.items() if any(v.get("persistentVolumeClaim", {}).get("claimName") == "recsys-events" for v in p["volumes"])}
    assert users == {"recsys-events", "recsys-daily"}
    assert [i["key"] for v in lists["volumes"] if "secret" in v for i in v["secret"]["items"]] == ["read.toml"]

# ---- what they name exists

@pods
def test_settings_load_under_this_environment(key, monkeypatch):
    "An unknown name or an impossible value would stop the program."
    env = environment(key)
    for name, value in env.items():
        if name.startswith("RECSYS_") and name != "RECSYS_SETTINGS": monkeypatch.setenv(name, value)
    s = load_settings(ROOT/"settings.ini")
    assert s.serving.host == "0.0.0.0" and s.serving.state.startswith("redis://") and s.paths.data == "/data"
    assert {n for n in env if not n.startswith("RECSYS_")} == {"PATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "HOME", "TMPDIR", "NUMBA_CACHE_DIR"}
    assert PODS[key]["enableServiceLinks"] is False, "else Kubernetes sets RECSYS_EVENTS_SERVICE_HOST and the like, and settings refuse"
    assert parser().parse_args(container(key)["args"]).do
    for source in container(key)["envFrom"]:
        if "configMapRef" in source: assert ("ConfigMap", source["configMapRef"]["name"]) in NAMED

def test_probes_ask_addresses_that_are_open():
    for key, pod in PODS.items():
        if key[0] != "Deployment": continue
        c = container(key)
        assert [c[p]["httpGet"]["path"] for p in ("startupProbe", "readinessProbe", "livenessProbe")] == ["/readyz", "/readyz", "/healthz"]
        for p in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert find_route("GET", c[p]["httpGet"]["path"])[0].scope is None and c[p]["httpGet"]["port"] == c["ports"][0]["name"]
        assert c["ports"][0]["containerPort"] == int(environment(key)["RECSYS_SERVING_PORT"]) == int(re.search(r"^EXPOSE (\d+)$", IMAGE, re.M)[1])

def test_keys_are_mounted_where_they_are_looked_for_and_closed_to_others():
    for key, pod in PODS.items():
        if key[0] != "Deployment": continue
        env, file = environment(key), PurePosixPath(environment(key)["RECSYS_SERVING_KEYS_FILE"])
        mount = mounts(key)[str(file.parent)]
        secret = next(v["secret"] for v in pod["volumes"] if v["name"] == mount["name"])
        assert mount["readOnly"] and file.name in [i["path"] for i in secret["items"]] and secret["defaultMode"] & 0o007 == 0 and secret["defaultMode"] & 0o040
        check_exposure(env["RECSYS_SERVING_HOST"], env["RECSYS_SERVING_KEYS_FILE"])
        assert not ipaddress.ip_address(env["RECSYS_SERVING_HOST"]).is_loopback

def test_each_pod_has_its_own_figures():
    for key, pod in PODS.items():
        if key[0] == "Deployment": assert "emptyDir" in next(v for v in pod["volumes"] if v["name"] == mounts(key)["/data/metrics"]["name"])

def test_no_secret_is_in_the_files(): assert "Secret" not in {d["kind"] for d in OBJECTS}

# ---- who they run as

@pods
def test_nothing_runs_as_root_or_may_become_it(key):
    pod, c = PODS[key], container(key)
    user, = re.findall(r"^USER (\d+):(\d+)$", IMAGE, re.M)
    assert int(user[0]) > 0 and pod["securityContext"]["runAsNonRoot"] and {pod["securityContext"][k] for k in ("runAsUser", "runAsGroup", "fsGroup")} == {int(user[0])}
    assert pod["automountServiceAccountToken"] is False and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert c["securityContext"] == dict(allowPrivilegeEscalation=False, readOnlyRootFilesystem=True, capabilities=dict(drop=["ALL"]))
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys() and not any("hostPath" in v for v in pod["volumes"])

@pods
def test_whatever_is_written_has_a_volume(key):
    for name in ("HOME", "TMPDIR", "NUMBA_CACHE_DIR", "RECSYS_PATHS_DATA", "RECSYS_PATHS_REPORTS"):
        path = PurePosixPath(environment(key)[name])
        assert any(str(p) in mounts(key) and not mounts(key)[str(p)].get("readOnly") for p in (path, *path.parents)), name

# ---- the image

def test_the_image_copies_what_exists_and_takes_wheels_only():
    for line in re.findall(r"^COPY (?!--from)(.*)$", IMAGE, re.M):
        for source in line.split()[:-1]: assert (ROOT/source).exists(), source
    kept = {l[1:] for l in (ROOT/"deploy"/"Containerfile.dockerignore").read_text().splitlines() if l.startswith("!")}
    shipped = re.search(r"SHIPPED = (\(.*?\))", (ROOT/"setup.py").read_text(), re.S).group(1)
    assert {str(PurePosixPath(p).parent) if "*" in p else p for p in re.findall(r'"([^"]+)"', shipped)} <= kept, "what every installation has is in the image"
    assert kept == {s for line in re.findall(r"^COPY (?!--from)(.*)$", IMAGE, re.M) for s in line.split()[:-1]}
    assert "--only-binary :all: -c constraints.txt" in IMAGE and IMAGE.count("pip install") == 1 and len(set(re.findall(r"^FROM (\S+)", IMAGE, re.M))) == 1
    assert IMAGE.rstrip().rpartition("USER")[2].count("RUN") == 0, "nothing is done as root after USER"

def test_the_readme_tells_of_every_file():
    text = (ROOT/"deploy"/"README.md").read_text(encoding="utf-8")
    assert {f for f in FILES if f != "kustomization.yaml" and f"`{f}`" not in text} == set()
    assert set(re.findall(r"RECSYS_[A-Z_]+", text)) <= {"RECSYS_SECTION_KEY", "RECSYS_SERVING_STATE", "RECSYS_INDEX_URI", "RECSYS_INDEX_TOKEN", "RECSYS_INDEX_BACKEND", "RECSYS_SERVING_HOST", "RECSYS_SERVING_KEYS_FILE"}
