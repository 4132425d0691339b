"The daily run as a Dagster job with a schedule: `dagster dev -f dagster_job.py`."
import subprocess

from dagster import Definitions, Failure, OpExecutionContext, RetryRequested, ScheduleDefinition, job, op

PROJECT, COMMAND = "/srv/recsys", [".venv/bin/recsys", "run"]
LOOK, BUSY = 2, 75

@op
def run(context: OpExecutionContext) -> int:
    with subprocess.Popen(COMMAND, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as p:
        for line in p.stdout: context.log.info(line.rstrip())
    if p.returncode == BUSY: raise RetryRequested(max_retries=2, seconds_to_wait=1800)
    if p.returncode == LOOK: context.log.warning("somebody should look: nothing new was published, the version before goes on serving; the line above says why")
    elif p.returncode: raise Failure(f"recsys run ended with exit code {p.returncode}; the line above says why")
    return p.returncode

@job
def recsys(): run()

daily = ScheduleDefinition(job=recsys, cron_schedule="0 4 * * *")
definitions = Definitions(jobs=[recsys], schedules=[daily])
