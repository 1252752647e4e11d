"""Load balancers of the lab: one Traefik for each that the vendors were told of, on an address of its own, and health
checks whose results the vendors tell. What an ALB or Google's does with a request is in ``fronts``; TLS is not played.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.lab.fronts import Front, Pool
from tests.lab.namespaces import ROOM

TRAEFIK = Path(sys.executable).with_name("traefik")
LOOK_S = 0.2
CHECK_S, CHECK_TIMEOUT_S, FAILURES = 1.0, 4.0, 2
"""A target is down after so many checks in a row; up with the first that succeeds. ALB and Google take 5 s a check."""


class Balancers:
    """``fronts``: all load balancers as they are to be now. ``tell``: hears which targets are down."""

    def __init__(self, fronts: Callable[[], list[Front]], tell: Callable[[set[str]], None]) -> None:
        self._fronts, self._tell = fronts, tell
        self._running: dict[str, _Traefik] = {}
        self._failures: Counter[str] = Counter()
        self._up: set[str] = set()
        self._pools: dict[str, Pool] = {}
        self._closed = threading.Event()
        self.problems: list[BaseException] = []
        self._threads = [threading.Thread(target=self._loop, args=a, daemon=True) for a in self._work()]
        for thread in self._threads:
            thread.start()

    def _work(self) -> list[tuple[Callable[[], None], float]]:
        return [(self._look, LOOK_S), (self._check, CHECK_S)]

    def names(self) -> list[str]:
        """Of those that are there."""
        return list(self._running)

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()
        for traefik in self._running.values():
            traefik.stop()

    def _loop(self, do: Callable[[], None], every_s: float) -> None:
        while not self._closed.wait(every_s):
            try:
                do()
            except Exception as error:
                self.problems.append(error)
                raise

    def _look(self) -> None:
        fronts = {front.name: front for front in self._fronts()}
        self._pools = {t: p for f in fronts.values() for r in f.rules for p, _ in r.pools for t in p.targets}
        for name in self._running.keys() - fronts.keys():
            self._running.pop(name).stop()
        for name, front in fronts.items():
            if name not in self._running:
                self._running[name] = _Traefik(front)
            self._running[name].route(front, self._up)

    def _check(self) -> None:
        pools = dict(self._pools)
        if pools:
            with ThreadPoolExecutor(min(8, len(pools))) as at_once:
                answers = dict(zip(pools, at_once.map(_answers, pools, pools.values()), strict=True))
            for target, good in answers.items():
                self._failures[target] = 0 if good else self._failures[target] + 1
        known = {t for t, failures in self._failures.items() if t in pools and failures < FAILURES}
        # One that was never up is down.
        self._up = {t for t in known if t in self._up or self._failures[t] == 0}
        self._tell(set(pools) - self._up)


def _answers(target: str, pool: Pool) -> bool:
    host, _, port = target.rpartition(":")
    try:
        if pool.grpc:
            socket.create_connection((host, int(port)), CHECK_TIMEOUT_S).close()
            return True
        with urllib.request.urlopen(f"http://{target}{pool.health_path}", timeout=CHECK_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class _Traefik:
    def __init__(self, front: Front) -> None:
        self._folder = ROOM / "balancers" / front.name
        shutil.rmtree(self._folder, ignore_errors=True)
        (self._folder / "routes").mkdir(parents=True)
        self._routes: dict[str, Any] = {}
        entry = {"address": f"{front.address}:{front.port}", "http": {"sanitizePath": False}}
        entry["transport"] = {"respondingTimeouts": {"readTimeout": "0s", "writeTimeout": "0s"}}
        static = {
            "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
            "log": {"level": "ERROR", "filePath": str(self._folder / "traefik.log")},
            "entryPoints": {"web": entry},
            "providers": {
                "providersThrottleDuration": "20ms",
                "file": {"directory": str(self._folder / "routes"), "watch": True},
            },
        }
        (self._folder / "traefik.yml").write_text(json.dumps(static))
        command = [str(TRAEFIK), f"--configFile={self._folder}/traefik.yml"]
        with (self._folder / "output").open("wb") as out:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def route(self, front: Front, up: set[str]) -> None:
        assert self._process.poll() is None, (self._folder / "output").read_text()
        routes = _dynamic(front, up)
        if routes != self._routes:
            self._routes = routes
            part = self._folder / "routes.part"
            part.write_text(json.dumps(routes))
            part.rename(self._folder / "routes" / "routes.yml")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def _dynamic(front: Front, up: set[str]) -> dict[str, Any]:
    """Traefik's routes: first rule first; a rule without weight, or a pool without target, answers 503."""
    services: dict[str, Any] = {"none": {"loadBalancer": {"servers": []}}}
    routers: dict[str, Any] = {}
    retries: dict[str, Any] = {}
    for number, rule in enumerate(front.rules):
        weighted = []
        for position, (pool, weight) in enumerate(rule.pools):
            good = [t for t in pool.targets if t in up]
            targets = good or (list(pool.targets) if pool.fails_open else [])
            name = f"r{number}p{position}"
            scheme = "h2c" if pool.grpc else "http"
            services[name] = {"loadBalancer": {"servers": [{"url": f"{scheme}://{t}"} for t in targets]}}
            if weight:
                weighted.append({"name": name, "weight": weight})
        if weighted:
            services[f"r{number}"] = {"weighted": {"services": weighted}}
        router = {"rule": rule.match, "priority": 1000 - number, "service": f"r{number}" if weighted else "none"}
        if rule.tries > 1:
            retries[f"try{rule.tries}"] = {"retry": {"attempts": rule.tries}}
            router["middlewares"] = [f"try{rule.tries}"]
        routers[f"r{number}"] = router | {"entryPoints": ["web"]}
    http: dict[str, Any] = {"routers": routers, "services": services}
    return {"http": http | ({"middlewares": retries} if retries else {})}
