"The daily run as an Airflow DAG (Airflow 3): put this file into the dags folder. A run that finds another one at work is tried again later; one whose new version was refused or is held is skipped, not failed."
from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

PROJECT = "/srv/recsys"
# 75, another run is at work, becomes an ordinary failure here, which Airflow tries again; 2 is its skip_on_exit_code.
COMMAND = ".venv/bin/recsys run"

with DAG("recsys", schedule="0 4 * * *", start_date=datetime(2026, 1, 1), catchup=False, max_active_runs=1, tags=["recsys"],
         default_args=dict(retries=2, retry_delay=timedelta(minutes=30), execution_timeout=timedelta(hours=6))) as dag:
    BashOperator(task_id="run", bash_command=COMMAND, cwd=PROJECT, skip_on_exit_code=2)
