"""A server of files on loopback that fails on purpose."""

import http.server
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path


class Faults:
    """What goes wrong: for each of the first requests of a file, by its number, "500", "cut" or "slow"."""

    def __init__(self, plan):
        self.plan = dict(plan)
        self.requests: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        self._lock = threading.Lock()

    def next(self, name):
        """Return what goes wrong with this request."""
        with self._lock:
            number = self.requests[name]
            self.requests[name] += 1
            fault = self.plan.get((name, number), "")
            self.met[fault] += 1
            return fault


@contextmanager
def serving(folder: Path, plan=()):
    """Serve a folder; yield (address, Faults)."""
    faults = Faults(plan)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_GET(self):
            fault = faults.next(self.path.rpartition("/")[2])
            if fault == "500":
                self.send_error(500)
                return
            path = Path(self.translate_path(self.path))
            if fault not in ("cut", "slow") or not path.is_file():
                super().do_GET()
                return
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for start in range(0, len(data), 1 + len(data) // 4):
                if fault == "cut" and start:
                    self.close_connection = True
                    return
                self.wfile.write(data[start : start + 1 + len(data) // 4])
                self.wfile.flush()
                time.sleep(0.05)

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
        server.shutdown()
        thread.join()
