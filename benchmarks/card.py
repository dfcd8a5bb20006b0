"""What a GPU's clock and power were while something ran."""

import re
import statistics
import subprocess
import tempfile
from contextlib import suppress


class CardReadings:
    """Clock and power of this node's GPUs, read twice a second while the context is open."""

    process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "CardReadings":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "500"]
        self.clock_mhz = self.power_watts = None
        self.output = tempfile.TemporaryFile("w+")
        with suppress(FileNotFoundError):
            self.process = subprocess.Popen(query, stdout=self.output, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        self.output.seek(0)
        rows = [line.split(",") for line in self.output if re.fullmatch(r"[\d.]+, [\d.]+\s*", line)]
        if rows:
            self.clock_mhz = statistics.median(float(row[0]) for row in rows)
            self.power_watts = statistics.median(float(row[1]) for row in rows)
        self.output.close()
