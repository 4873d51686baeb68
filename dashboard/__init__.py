"""The dashboard: pages that read run directories, and reports of the same charts in one file.

Packages, in the order of their imports. A package may import only packages to the left of it, and
no neighbour of its own column (tests/project/test_imports.py):

    data ─┬─► figures ─┬─► url ─► components ─► cascade ─► pages ─► reports ─► app ─► serve
          └─► server ──┘

    data         tables of a run as dense arrays, cached and brought up to date
    figures      pure functions from arrays to Plotly figures
    server       access token, compression, the runs that are served
    url          the query string as state, and the callbacks that redraw charts from it
    components   cards, tables, tiles, the frame around every page
    cascade      the chosen spike, its verdict, the series of one cell
    pages        layout and callbacks of each page
    reports      one run or several as one HTML file without a network
    app, serve   the Dash application and its web server

Every figure is drawn from a `RunCache` (data) and a `View` (url), and from nothing else.
"""

if __name__ == "dashboard":
    # A second import name would load a second copy of every class.
    raise ImportError("import geodiag.dashboard, not dashboard")
