"""Unwraps responses of a server from client envelopes, and tells why one holds no routing."""

from typing import Any

from exflow.profiling.importers.json_values import shown

ROUTED, PROMPT = "routed_experts", "prompt_routed_experts"

_OF_RESPONSES = {ROUTED, PROMPT, "choices", "meta_info", "sglext"}
_ASK = "start the server with --enable-return-routed-experts (SGLang: and ask for return_routed_experts)"


def unwrapped(value: Any) -> Any:
    """Take the response out of a client's envelope: {"status": 200, "body": ...}, or the line of a batch file
    (OpenAI's, vLLM's run-batch): {"custom_id": ..., "response": {"status_code": 200, "body": ...}, "error":
    null}."""
    while isinstance(value, dict) and not _OF_RESPONSES & value.keys():
        inner = next((value[key] for key in ("response", "body") if isinstance(value.get(key), dict)), None)
        if inner is None or _error(value) is not None:
            return value
        value = inner
    return value


def lack(value: Any) -> tuple[str, str]:
    """The kind of an unwrapped value without routing, as a plural noun, and a reason."""
    if not isinstance(value, dict):
        return "responses without routing", f"is {shown(value)}; give the JSON object of a response"
    error = _error(value)
    if error is not None:
        return "responses that are errors", f"is an error ({shown(error)})"
    if value.get("choices") == []:
        return "responses without routing", "has no choices"
    parts = [value, value.get("meta_info"), value.get("sglext"), *(value.get("choices") or [])]
    if any(isinstance(part, dict) and part.keys() & {ROUTED, PROMPT} for part in parts):
        return "responses without routing", "holds routed_experts without a row (aborted?)"
    return "responses without routing", f"holds no routed_experts; {_ASK}"


def _error(value: dict[str, Any]) -> Any:
    """The message of an error; None where the value is no error.

    Known forms: {"error": {"message"}} of OpenAI and vLLM, {"object": "error"} of SGLang, {"detail"} of
    FastAPI, and any HTTP status from 400 up.
    """
    for name in ("error", "errors", "detail"):
        told = value.get(name)
        if told:
            return told.get("message") or told if isinstance(told, dict) else told
    codes = [value.get(name) for name in ("status_code", "status", "code")]
    failed = next((code for code in codes if type(code) is int and 400 <= code < 600), None)
    if value.get("object") == "error" or failed is not None:
        return value.get("message") or failed or "error"
    return None
