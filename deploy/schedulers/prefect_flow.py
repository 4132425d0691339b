"The daily run as a Prefect flow (Prefect 3): `python prefect_flow.py` serves it, every day at four."
import subprocess

from prefect import flow, get_run_logger, task

PROJECT, COMMAND = "/srv/recsys", [".venv/bin/recsys", "run"]
LOOK, BUSY = 2, 75

class Busy(Exception): "Another run is at work."

@task(retries=2, retry_delay_seconds=1800, retry_condition_fn=lambda task, run, state: isinstance(state.result(raise_on_failure=False), Busy))
def run():
    log = get_run_logger()
    with subprocess.Popen(COMMAND, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as p:
        for line in p.stdout: log.info(line.rstrip())
    if p.returncode == BUSY: raise Busy("another run is at work")
    if p.returncode == LOOK: log.warning("somebody should look: nothing new was published, the version before goes on serving; the line above says why")
    elif p.returncode: raise RuntimeError(f"recsys run ended with exit code {p.returncode}; the line above says why")
    return p.returncode

@flow(name="recsys")
def recsys(): return run()

if __name__ == "__main__": recsys.serve(name="daily", cron="0 4 * * *", limit=1)
