"""How much a server takes on: what is above a limit is refused with words, not left to fail."""

from dataclasses import dataclass

from megatron_deepseek.serving.errors import ApiError


@dataclass(frozen=True)
class Limits:
    """Sizes and times. `running`: answers that the engine makes at a time; `queue`: as many more may wait.

    `body_bytes` of a request; `body_seconds` for sending it; `request_seconds` for answering it; `drain_seconds` for
    what still runs when the server is told to stop; `idle_seconds` for a connection that sends nothing, or reads
    nothing of an answer; `connections` at a time.
    """

    running: int
    queue: int = 256
    body_bytes: int = 8 * 2**20
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    drain_seconds: float = 25.0
    idle_seconds: float = 30.0
    connections: int = 1024

    def admit(self, number: int, answering: int) -> None:
        """Raise ApiError unless `number` more answers may be asked for beside those that are being made or wait."""
        most = self.running + self.queue
        if number > most:
            raise ApiError(400, f"{number} answers are asked for at once, and the server takes at most {most}", "n")
        if answering + number > most:
            raise ApiError(429, f"{answering} answers are being made or wait, and the server takes at most {most}; "
                                "try again later", headers={"Retry-After": str(self._retry_after(answering))})

    def _retry_after(self, answering: int) -> int:
        """Return seconds after which a place is likely to be free: one for each round of running answers that waits."""
        return min(60, max(1, answering // self.running))
