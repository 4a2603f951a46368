"""The servers of a team, with proxies that disturb them."""

import tempfile
from pathlib import Path

from benchmarks.campaign.proxy import Proxy
from benchmarks.campaign.servers import MlflowServer, PostgresServer, postgres_programs, read_compose


class Team:
    """PostgreSQL, and MLflow's server on it, each behind a proxy, until the campaign ends."""

    def __init__(self, folder: Path) -> None:
        programs = postgres_programs()
        assert programs is not None
        folder.mkdir()
        self.database = PostgresServer(programs)
        self.database_proxy = Proxy(self.database.port)
        uri = self.database.new_database().replace(f":{self.database.port}/", f":{self.database_proxy.port}/")
        services = read_compose({"POSTGRES_PASSWORD": "unused"})
        self.mlflow = MlflowServer(services, uri, folder / "artifacts", None, Path(tempfile.mkdtemp(dir=folder)))
        self.mlflow_proxy = Proxy(int(self.mlflow.uri.rpartition(":")[2]))

    @property
    def uri(self) -> str:
        """For tracking.uri."""
        return f"http://127.0.0.1:{self.mlflow_proxy.port}"

    def heal(self) -> None:
        """End all faults."""
        self.mlflow_proxy.mode = self.database_proxy.mode = "pass"

    def stop(self) -> None:
        """End all servers."""
        for end in (self.mlflow_proxy.stop, self.mlflow.stop, self.database_proxy.stop, self.database.remove):
            end()
