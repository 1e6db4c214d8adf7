"""What a client raises."""

from llmr_ray.errors import LlmrError, ResourceError


class RequestRefusedError(LlmrError):
    """The server does not answer this request, however often it is sent.

    Args:
        message: what was seen and what to do.
        status: HTTP status.
        code: the server's word for the reason, for programs.
        param: the field that was wrong, if the server said so.
        request_id: under which the server logged the request.
    """

    exit_code = 3

    def __init__(
        self, message: str, status: int = 400, code: str = "", param: str | None = None, request_id: str = ""
    ) -> None:
        super().__init__(message, status, code, param, request_id)
        self.message, self.status, self.code = message, status, code
        self.param, self.request_id = param, request_id

    def __str__(self) -> str:
        return self.message


class ServerUnavailableError(ResourceError):
    """There was no usable answer: no server, a busy one, or one that failed. The same request may succeed later.

    Args:
        message: what was seen and what to do.
        status: HTTP status of the last answer; None: there was none.
        retry_after: seconds that the server asked to wait.
        request_id: under which the server logged the request.
    """

    def __init__(
        self, message: str, status: int | None = None, retry_after: float | None = None, request_id: str = ""
    ) -> None:
        super().__init__(message, status, retry_after, request_id)
        self.message, self.status = message, status
        self.retry_after, self.request_id = retry_after, request_id

    def __str__(self) -> str:
        return self.message
