"""Stage 5: what TensorBoard asks of its tab, answered: the frame, the list of runs, their view.

TensorBoard imports this file at its start, so that all that takes time is imported when the tab is
opened. Nothing here knows how a history is read or drawn.
"""

import logging
import zlib
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from tensorboard.backend import experiment_id, http_util
from tensorboard.context import from_environ
from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from werkzeug.exceptions import BadRequest, HTTPException, MethodNotAllowed, NotFound
from werkzeug.wrappers import Request, Response

from concept_guard.board.runs import PLUGIN, Runs, UnknownRunError

if TYPE_CHECKING:
    from concept_guard.entries import AnyEntry
    from concept_guard.history import RunHistory

__all__ = ["ConceptGuardPlugin"]

_LOG = logging.getLogger(__name__)
_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_DAY = 24 * 3600  # seconds
STEPS = "Concept-Guard-Steps"  # header of a view: up to which step each run has come

Handler = Callable[[Request], Response]


class ConceptGuardPlugin(TBPlugin):  # type: ignore[misc]  # TensorBoard has no types
    """The tab "concept_guard" of TensorBoard.

    Args:
        context: What TensorBoard hands to its plugins.
    """

    plugin_name = PLUGIN

    def __init__(self, context: TBContext) -> None:
        self._runs = Runs(context.logdir, context.data_provider)

    def is_active(self) -> bool:
        """Return False at once: where a guard has written, TensorBoard itself sees that."""
        return False

    def frontend_metadata(self) -> FrontendMetadata:
        """Return how TensorBoard shows the tab, which has its own button to refresh."""
        return FrontendMetadata(es_module_path="/index.js", tab_name=PLUGIN, disable_reload=True)

    def get_plugin_apps(self) -> dict[str, Any]:
        """Return what answers which address below `data/plugin/concept_guard`."""
        return {
            "/index.js": _application(self._script),
            "/style.css": _application(self._style),
            "/runs": _application(self._list),
            "/view": _application(self._view),
            "/card": _application(self._card),
        }

    def _script(self, request: Request) -> Response:
        return _respond(request, _own_file("index.js"), "text/javascript")

    def _style(self, request: Request) -> Response:
        from concept_guard.report.runs import style

        return _respond(request, style() + _own_file("frame.css"), "text/css")

    def _list(self, request: Request) -> Response:
        runs = self._runs.listed(*_asked(request))
        content = {
            "runs": list(runs),
            "newest": max(runs, key=lambda name: runs[name], default=None),
            "folder": self._runs.logdir,
            "problem": self._runs.problem(),
        }
        return _respond(request, content, "application/json")

    def _view(self, request: Request) -> Response:
        names = dict.fromkeys(request.args.get(key, "") for key in ("run", "other"))
        shown = [name for name in names if name]
        if "other" in request.args and not request.args.get("run"):
            raise BadRequest("`other` is compared with `run`: name that one as well.")
        try:
            histories = [self._runs.history(name, *_asked(request)) for name in shown]
        except UnknownRunError as error:
            raise NotFound(f"{error}.") from error
        response = _respond(request, _fragment(*histories), "text/html")
        response.headers[STEPS] = ",".join(str(_last_step(history)) for history in histories)
        response.add_etag()
        return response.make_conditional(request)

    def _card(self, request: Request) -> Response:
        name, step, slot = (
            request.args.get("run", ""),
            _number(request, "step"),
            _number(request, "slot"),
        )
        picture = self._runs.card(name, step, slot)
        if picture is None:  # the history was never asked for since TensorBoard has started
            try:
                picture = self._runs.history(name, *_asked(request)).cards.get((step, slot))
            except UnknownRunError as error:
                raise NotFound(f"{error}.") from error
        kind = next((k for start, k in _KINDS.items() if (picture or b"").startswith(start)), None)
        if picture is None or kind is None:
            raise NotFound(f"run {name!r} has no picture of slot {slot} at update {step}.")
        return _respond(request, picture, kind, expires=_DAY)


def _application(handler: Handler) -> Any:
    """Return a WSGI application that answers with a plain sentence where a handler fails."""

    def answer(request: Request) -> Response:
        try:
            if request.method not in {"GET", "HEAD"}:
                raise MethodNotAllowed(
                    ["GET", "HEAD"], f"{request.method[:20]} is not answered; use GET."
                )
            return handler(request)
        except HTTPException as error:
            return _respond(request, error.description or "", "text/plain", code=error.code)
        except Exception:
            _LOG.exception("the tab of concept_guard failed at %s", request.path)
            said = "This could not be shown; the terminal of TensorBoard says why."
            return _respond(request, said, "text/plain", code=500)

    return Request.application(answer)


def _respond(request: Request, content: Any, kind: str, **options: Any) -> Response:
    """Return an answer as TensorBoard gives it: compressed, not sniffed, with rules for scripts."""
    response: Response = http_util.Respond(request, content, kind, **options)
    return response


def _asked(request: Request) -> tuple[Any, str]:
    experiment = request.environ.get(experiment_id.WSGI_ENVIRON_KEY, "")
    return from_environ(request.environ), experiment


def _number(request: Request, key: str) -> int:
    given = request.args.get(key, "")
    if not (given.isascii() and given.isdecimal() and len(given) < 20):
        raise BadRequest(f"{key}={given[:50]!r} is not a whole number from 0 on.")
    return int(given)


def _own_file(name: str) -> str:
    return files("concept_guard.board").joinpath(name).read_text(encoding="utf8")


def _last_step(history: "RunHistory") -> int:
    entries: tuple[AnyEntry, ...] = (*history.starts, *history.rounds, *history.acts)
    return max((entry.step for entry in entries), default=0)


@lru_cache(maxsize=8)
def _fragment(*histories: "RunHistory") -> str:
    """Return the view; that of the same histories is not drawn again."""
    from concept_guard.report.runs import fragment

    pictures = {history.name: history.cards for history in histories}

    def address(name: str, step: int, slot: int) -> str:
        # A resumed run draws a card anew: its address differs, so that no old one is shown.
        content = zlib.crc32(pictures[name][step, slot])
        return f"card?{urlencode({'run': name, 'step': step, 'slot': slot, 'content': content})}"

    return fragment(histories, address)
