"""The Dash application: its pages, and the graph of its callbacks.

    url.pathname ────────────────► route ────► page, nav
    interval ─(only in a visible tab)─► tick ─► beat ────► pulse ── changes only when the run does
                                          │       └──────► status, problems, legend, interval on
                                          or off └─► runs-table, on the list of runs
    url.search, pulse, theme ────► draw ─────► each chart and each live piece of the page
                                                         (url/live_figures.py)
    controls, drags, clicks ─────► update_url ─────► url.search, and back to the controls
                                                         (url/url_sync.py)
    ask-off, ask-auto, ask-on ───► ask ──────► asked ──► control panel
                                                         (components/control_panel.py)
    theme-button ─(in the browser)─► theme, cookie, provider

The address is the only state: `/run/NAME/gain?metric=single&steps=300-400` always shows the same
view. A page that is not open has no components, so nothing of it is computed.
"""

import os
from types import ModuleType
from urllib.parse import quote

from dash import ClientsideFunction, Dash, Input, Output, State, html, no_update
from flask import redirect
from flask import request as http

from geodiag.dashboard.components import control_panel, frame
from geodiag.dashboard.components.basic import notice
from geodiag.dashboard.pages import activations, cascade, events, gain, overview, routing, runs
from geodiag.dashboard.server.access import new_token, require_token
from geodiag.dashboard.server.compression import compress, preload
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.url_state import View

PAGES: dict[str, ModuleType] = {
    p.NAME: p for p in (overview, cascade, gain, routing, activations, events)
}
TABS = [(name, page.TITLE) for name, page in PAGES.items()]


def create_app(
    path: str | os.PathLike, token: str | None = None, *, only_loopback: bool = True
) -> Dash:
    """Return the application over the run or the folder of runs at `path`.

    Every request needs `token`. None creates a random token, which is stored in
    `app.server.config["GEODIAG_TOKEN"]`. `only_loopback` also refuses requests whose host name is
    not a loopback name. GeodiagError if there is no run.
    """
    library = RunLibrary(path)
    app = Dash(
        "geodiag",
        title="geodiag",
        update_title="",
        assets_folder=_assets(),
        suppress_callback_exceptions=True,
    )
    app.layout = frame.page_frame
    app.server.config["GEODIAG_TOKEN"] = token = token or new_token()
    require_token(app.server, token, only_loopback)
    compress(app.server)
    preload(app.server, [name for name, page in PAGES.items() if page is not events])

    if library.single is not None:

        @app.server.before_request
        def redirect_to_single_run():
            return (
                redirect(f"/run/{quote(library.single or '')}/overview")
                if http.path == "/"
                else None
            )

    _register_frame(app, library)
    control_panel.register(app, library)
    for page in (runs, *PAGES.values()):
        page.register(app, library)
    return app


def page_at(library: RunLibrary, pathname: str | None, search: str | None) -> html.Div:
    """Return the content of the page at an address."""
    parts = (pathname or "/").strip("/").split("/")
    if parts == [""]:
        return runs.layout(library)
    cache = library.at_address(pathname)
    page = PAGES.get(parts[2] if len(parts) > 2 else "overview")
    if cache is None or page is None:
        problem = "There is no such run here." if cache is None else "There is no such page."
        return notice([problem, " ", html.A("All runs", href="/")])
    return page.layout(cache, View.parse(search))


def live_state(library: RunLibrary, pathname: str | None, old: dict | None) -> tuple:
    """Return (pulse, interval is off, status, problems, legend) of the page at an address.

    The pulse is `no_update` while the run has not changed.
    """
    if (pathname or "/").strip("/") == "":
        return no_update, False, [], [], []
    cache = library.at_address(pathname)
    if cache is None:
        return no_update, True, [], [], []
    status = cache.run.status()
    new = {"run": cache.run.name, "version": cache.refresh(), "status": status}
    same = new == old
    around = frame.run_status(cache), frame.problems(cache), frame.legend(cache, pathname or "/")
    return no_update if same else new, status != "running", *around


def _register_frame(app: Dash, library: RunLibrary) -> None:
    @app.callback(Output("page", "children"), Input("url", "pathname"), State("url", "search"))
    def route(pathname, search):
        return page_at(library, pathname, search)

    @app.callback(Output("nav", "children"), Input("url", "pathname"), Input("url", "search"))
    def tabs(pathname, search):
        single = library.single is not None
        return frame.nav(
            library.at_address(pathname), TABS, pathname or "/", View.parse(search), single
        )

    @app.callback(
        Output("pulse", "data"),
        Output("interval", "disabled"),
        Output("run-status", "children"),
        Output("problems", "children"),
        Output("legend", "children"),
        Input("tick", "data"),
        Input("url", "pathname"),
        State("pulse", "data"),
    )
    def follow(tick, pathname, old):
        return live_state(library, pathname, old)

    for name, outputs, inputs in (
        ("tick", Output("tick", "data"), [Input("interval", "n_intervals")]),
        (
            "theme",
            [Output("theme", "data"), Output("provider", "forceColorScheme")],
            [
                Input("theme-button", "n_clicks"),
                State("theme", "data"),
                State("theme-known", "data"),
            ],
        ),
    ):
        app.clientside_callback(ClientsideFunction("geodiag", name), outputs, inputs)


def _assets() -> str:
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")
